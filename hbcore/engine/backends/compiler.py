"""The C++ compiler of this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence


def compiler_on_path(names: Sequence[str] = ("g++", "clang++", "cl")) -> str | None:
    """The path of the C++ compiler: ``$CXX``, or the first of ``names`` that is on ``PATH``; None if there is none.

    The list is Inductor's. Looking first keeps ``torch.compile`` from failing halfway.
    """
    chosen = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [chosen] if chosen else names)), None)
    return found or (shutil.which("clang") if sys.platform == "darwin" else None)
