"""What a run needs before torch is imported: Triton's interpreter where there is no GPU, few threads, and a cache."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path


def cuda_expected() -> bool:
    """Whether torch will find a CUDA device here, judged without importing torch.

    Triton reads ``TRITON_INTERPRET`` when it is imported, and torch may import Triton: asking torch would be too late.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    try:
        if importlib.metadata.version("torch").endswith("+cpu"):
            return False
    except importlib.metadata.PackageNotFoundError:
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


if not cuda_expected():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# One cache of compiled code for all processes of a run and for later runs; `make clean` removes it. Entries are keyed by what
# they were made of, versions included.
CACHES = Path(__file__).resolve().parent.parent / "build" / "test_caches"
for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HBCORE_CACHE_DIR"):
    os.environ.setdefault(variable, str(CACHES / variable.split("_")[0].lower()))
# torch reads these when it is imported, here and in the processes that tests start. More threads only make small
# tensors slower, and reductions differ with their number.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "2")
