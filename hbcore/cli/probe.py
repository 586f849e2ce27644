"""What ``hbcore doctor`` runs in a process of its own: a broken torch may abort, hang or exit, and the doctor must not.

Prints one line of JSON, last. Standard library, torch and Triton only; run by path, not as a module.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

if __name__ == "__main__":
    # Running by path puts this folder first, and its list.py and show.py before other people's modules.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]

try:  # at the top, because a kernel finds `tl` among its module's globals only
    import triton
    import triton.language as tl
except Exception as error:
    triton, TRITON_ERROR = None, f"{type(error).__name__}: {error}"
else:
    TRITON_ERROR = ""

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _add_one(pointer: Any) -> None:
        tl.store(pointer, tl.load(pointer) + 1)


def probe() -> dict[str, str]:
    """Look at torch, its GPU and Triton. Each answer is text; ``torch_error`` is empty when torch imports."""
    facts = {"torch": "", "torch_error": "", "gpu": "none", "triton": ""}
    try:
        import torch

        facts["torch"] = str(torch.__version__)
        available = torch.cuda.is_available()
        if available:
            facts["gpu"] = str(torch.cuda.get_device_name())
    except (Exception, SystemExit) as error:
        facts["torch_error"] = f"{type(error).__name__}: {error}"
        facts["gpu"] = facts["triton"] = "unknown, because torch does not work"
        return facts
    if triton is None:
        facts["triton"] = f"not usable: {TRITON_ERROR}"
    elif not available:
        facts["triton"] = "not usable: torch finds no GPU (TRITON_INTERPRET=1 runs kernels on the CPU, slowly)"
    else:
        facts["triton"] = _try_triton()
    return facts


def _try_triton() -> str:
    """Compile and launch a kernel: Triton builds its launcher with a C compiler, so importing it proves little."""
    import torch

    try:
        cell = torch.zeros(1, device="cuda")
        _add_one[(1,)](cell)
        return "usable" if cell.item() == 1 else f"not usable: 0 + 1 gave {cell.item()}"
    except Exception as error:
        return f"not usable: {type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps(probe()))
