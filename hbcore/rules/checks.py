"""Checks of structural fields, which have no bounds of :func:`hbcore.rules.transform.hyper`."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from hbcore.errors import HyperparameterError


def check_whole(label: str, number: Any, low: int) -> None:
    """Raise :class:`HyperparameterError` unless ``number`` is a whole number, at least ``low``."""
    if isinstance(number, bool) or not isinstance(number, Integral) or number < low:
        raise HyperparameterError(f"{label}={number!r} is not a whole number from {low} on; pass one.")
