"""The interval that a hyperparameter is allowed in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from hbcore.errors import HyperparameterError


@dataclass(frozen=True)
class Bounds:
    """The allowed interval of a hyperparameter; prints as ``[0, 1)``."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def admit(self, value: float) -> bool:
        """Whether ``value`` is inside. NaN never is."""
        return not (
            math.isnan(value)
            or (self.ge is not None and value < self.ge)
            or (self.gt is not None and value <= self.gt)
            or (self.le is not None and value > self.le)
            or (self.lt is not None and value >= self.lt)
        )

    def __str__(self) -> str:
        low = f"[{self.ge:g}" if self.ge is not None else f"({self.gt:g}" if self.gt is not None else "(-inf"
        high = f"{self.le:g}]" if self.le is not None else f"{self.lt:g})" if self.lt is not None else "inf)"
        return f"{low}, {high}"


def check_bounds(label: str, number: Any, bounds: Bounds) -> None:
    """Raise :class:`HyperparameterError` unless ``number`` is a number within ``bounds``. Tensors and
    tensor-likes pass: they were checked as plain numbers."""
    if isinstance(number, Tensor) or hasattr(type(number), "__torch_function__"):
        return
    if isinstance(number, bool) or not isinstance(number, Real):  # NumPy's numbers are registered as Real
        raise HyperparameterError(f"{label}={number!r} is a {type(number).__name__}; pass a number in {bounds}.")
    if not bounds.admit(float(number)):
        raise HyperparameterError(f"{label}={number!r} is outside {bounds}; pass a value inside that range.")
