"""Where pickles that version 0.1.0 wrote look for :class:`hbcore.SplitOpt`."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("hbcore.wrappers.split"), name)
