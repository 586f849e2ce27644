"""The forms in which users write a param group's entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from operator import itemgetter
from typing import Any

from torch import Tensor

from hbcore.errors import HyperparameterError


def getter(keys: Iterable[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """A getter of several of a group's entries in one call."""
    names = tuple(keys)
    return itemgetter(*names) if len(names) > 1 else lambda group: tuple(group[name] for name in names)


def length_of(value: Any) -> int | None:
    """The length of a tuple hyperparameter; None for a plain number."""
    value = fixed(value)
    return len(value) if isinstance(value, tuple) else None


def lengths(defaults: Mapping[str, Any]) -> dict[str, int]:
    """The entries whose default is a tuple of numbers, and how many those are."""
    tuples = {key: default for key, default in defaults.items() if isinstance(default, tuple)}
    return {key: len(default) for key, default in tuples.items() if all(isinstance(x, Real) for x in default)}


def check_length(key: str, value: Any, length: int) -> None:
    """Look whether an entry that is to be so many numbers is a sequence at all; rules check how long it is.

    Raises:
        HyperparameterError: it is not.
    """
    if not isinstance(fixed(value), tuple):
        raise HyperparameterError(f"{key}={value!r} is not {length} numbers; pass a tuple of {length}.")


def fixed(value: Any) -> Any:
    """An entry in hashable form: any sequence that users pass (a list, OmegaConf's ListConfig, an array) becomes a tuple."""
    if isinstance(value, (tuple, str, bytes, Tensor)):
        return value
    if isinstance(value, Sequence):
        return tuple(value)
    return tuple(value.tolist()) if getattr(value, "ndim", 0) == 1 and hasattr(value, "tolist") else value
