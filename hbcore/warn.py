"""Warnings that name the user's line, however deep inside hbcore they are issued."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import FrameType

LIBRARIES = frozenset(
    ("hbcore", "hb_adam", "hb_muon", "hb_psgd", "hb_soap", "hb_ecc", "torch", "contextlib", "functools", "importlib")
) | {"_frozen_importlib"}
"""Packages whose lines a user cannot change: torch's wrappers around ``step``, and the import system, lie in between."""


def warn_at_caller(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line that is the user's: outside :data:`LIBRARIES`, and in no optimizer's constructor.

    ``stacklevel`` would have to be counted anew for each way in (``get``, ``create``, ``from hbcore import``, a hook, a wrapper
    of torch's), and ``skip_file_prefixes`` is new in Python 3.12.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_passed_over(frame):
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_passed_over(frame: FrameType) -> bool:
    """Whether a frame is a library's, by its module or, where code was generated for another one, by its file; or builds an
    optimizer, for somebody who named its class."""
    if frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        return True
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if torch.__file__ is not None and Path(torch.__file__).parent in Path(frame.f_code.co_filename).parents:
        return True
    return frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), torch.optim.Optimizer)
