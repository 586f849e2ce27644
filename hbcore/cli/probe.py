"""Run by ``hbcore doctor`` in a separate process: a broken torch may abort, hang or exit, and the doctor must not.

The last line of output is JSON. Uses only the standard library, torch and Triton; run by path, not as a module.
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    # Running by path puts this folder first on sys.path, where list.py and show.py would shadow other modules.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]

try:  # at module level, because a kernel looks up `tl` in its module's globals
    import triton
    import triton.language as tl
except Exception as error:
    triton, TRITON_ERROR = None, f"{type(error).__name__}: {error}"
else:
    TRITON_ERROR = ""

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _add_one(pointer):  # type: ignore[no-untyped-def]  # Triton takes an annotation for a global variable
        tl.store(pointer, tl.load(pointer) + 1)


def probe() -> dict[str, str]:
    """Check torch, its GPU and Triton. All values are text; ``torch_error`` is empty if torch can be imported."""
    facts = {"torch": "", "torch_error": "", "gpu": "none", "triton": ""}
    try:
        import torch

        facts["torch"] = str(torch.__version__)
        available = torch.cuda.is_available()
        if available:
            facts["gpu"] = str(torch.cuda.get_device_name())
    except (Exception, SystemExit) as error:
        facts["torch_error"] = f"{type(error).__name__}: {error}"
        facts["gpu"] = facts["triton"] = "unknown, because torch is broken"
        return facts
    if triton is None:
        facts["triton"] = f"not usable: {TRITON_ERROR}"
    elif not available:
        facts["triton"] = "not usable: torch finds no GPU (TRITON_INTERPRET=1 runs kernels on the CPU, slowly)"
    else:
        facts["triton"] = _try_triton()
    return facts


def _try_triton() -> str:
    """Compile and launch a kernel: importing Triton proves little, since it builds its launcher with a C compiler."""
    import torch

    try:
        cell = torch.zeros(1, device="cuda")
        _add_one[(1,)](cell)
        return "usable" if cell.item() == 1 else f"not usable: 0 + 1 gave {cell.item()}"
    except Exception as error:
        return f"not usable: {type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps(probe()))
