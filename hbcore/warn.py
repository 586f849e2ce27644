"""Warnings that name the user's line, however deep inside hbcore they are issued."""

from __future__ import annotations

import sys
import warnings

LIBRARIES = ("hbcore", "hb_adam", "hb_muon", "hb_psgd", "hb_soap", "hb_ecc", "torch", "importlib", "_frozen_importlib")
"""Packages whose lines a user cannot change: torch's wrappers around ``step``, and the import system, lie in between."""


def warn_at_caller(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line that is outside :data:`LIBRARIES`.

    ``stacklevel`` would have to be counted anew for each way in (``get``, ``create``, ``from hbcore import``, a hook, a wrapper
    of torch's), and ``skip_file_prefixes`` is new in Python 3.12.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
