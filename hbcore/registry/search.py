"""Where to look for a hyperparameter: ranges that a manifest declares as plain data. ``hbcore tune`` draws from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from hbcore.errors import RegistryError


@dataclass(frozen=True)
class _Between:
    low: float
    high: float

    def __post_init__(self) -> None:
        numbers: tuple[object, ...] = (self.low, self.high)
        for value in numbers:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RegistryError(f"{type(self).__name__}({self.low!r}, {self.high!r}): the ends must be finite numbers")
        if not self.low < self.high:
            raise RegistryError(f"{type(self).__name__}({self.low!r}, {self.high!r}): the first must be below the second")


@dataclass(frozen=True)
class Uniform(_Between):
    """Numbers between ``low`` and ``high``, all as likely.

    Raises:
        RegistryError: an end is not finite, or ``low`` is not below ``high``.
    """


@dataclass(frozen=True)
class LogUniform(_Between):
    """Positive numbers, of which each order of magnitude is as likely: learning rates, weight decay.

    Raises:
        RegistryError: an end is not finite, ``low`` is not below ``high``, or not positive.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise RegistryError(f"LogUniform({self.low!r}, {self.high!r}): the ends must be positive")


@dataclass(frozen=True)
class Decay(_Between):
    """Decay rates ``beta``, of which each order of magnitude of ``1 - beta`` is as likely: ``Decay(0.9, 0.999)``.

    Raises:
        RegistryError: an end is not finite, ``low`` is not below ``high``, negative, or ``high`` not below 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low < 0 or self.high >= 1:
            raise RegistryError(f"Decay({self.low!r}, {self.high!r}): the ends must be at least 0 and below 1")


@dataclass(frozen=True, init=False)
class Choice:
    """One of some numbers, strings, booleans and None: ``Choice(1, 2, 10)``.

    Raises:
        RegistryError: there are fewer than two values, or a value is something else.
    """

    values: tuple[Any, ...]

    def __init__(self, *values: object) -> None:
        if len(values) < 2:
            raise RegistryError(f"Choice{values!r}: give at least two values")
        if odd := [value for value in values if not (value is None or isinstance(value, (bool, int, float, str)))]:
            raise RegistryError(f"Choice{values!r}: {odd[0]!r} is no number, string, boolean or None")
        object.__setattr__(self, "values", values)

    def __reduce__(self) -> tuple[type[Choice], tuple[Any, ...]]:
        return Choice, self.values


Range: TypeAlias = Uniform | LogUniform | Decay | Choice
Searched: TypeAlias = Range | tuple[Any, ...]
"""A range, or a tuple hyperparameter of which some values are searched: ``(Decay(0.8, 0.99), 0.95)``."""


def checked(optimizer: str, search: Mapping[str, Searched]) -> dict[str, Searched]:
    """A copy of a spec's ``search``.

    Raises:
        RegistryError: it is no mapping, a key is no identifier, or a value contains no range.
    """
    given: object = search
    if not isinstance(given, Mapping):
        raise RegistryError(f"search of {optimizer!r} must be a mapping of hyperparameters to ranges; got {given!r}")
    for key, value in given.items():
        if not (isinstance(key, str) and key.isidentifier()):
            raise RegistryError(f"search of {optimizer!r} must have hyperparameters' names as keys; got {key!r}")
        parts = value if isinstance(value, tuple) else (value,)
        if not any(isinstance(part, (Uniform, LogUniform, Decay, Choice)) for part in parts):
            raise RegistryError(
                f"search of {optimizer!r}: {key}={value!r} is no range; pass LogUniform, Uniform, Decay or Choice, "
                "or a tuple that contains one"
            )
    return dict(given)
