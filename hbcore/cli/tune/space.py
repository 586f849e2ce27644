"""Where to look: the ranges that an optimizer's plugin declares, or those that follow from its hyperparameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hbcore import introspect
from hbcore.errors import OptionError
from hbcore.registry.search import Choice, Decay, LogUniform, Range, Searched, Uniform

if TYPE_CHECKING:
    from optuna import Trial

FACTOR = 10  # how far from the first learning rate to look, both ways
ROLES: Mapping[str, Range] = {
    "weight_decay": LogUniform(1e-4, 1.0),
    "first_moment": Decay(0.8, 0.98),
    "second_moment": Decay(0.9, 0.999),
}
"""The range of a hyperparameter with a role."""

DIGITS = 3  # of a number that is tried: more would only make commands long


def space_of(
    cls: Callable[..., torch.optim.Optimizer], declared: Mapping[str, Searched], lr: float | None, fixed: Mapping[str, Any]
) -> dict[str, Searched]:
    """The hyperparameters to search, without the ``fixed`` ones.

    Args:
        cls: the optimizer's class.
        declared: the ``search`` of its spec. If it is empty, the space is the learning rate, from ``lr / 10`` to ``10 lr``, and
            the hyperparameters with a role whose default is not zero, but for the weight decay, whose default may be.
        lr: the learning rate that a run would have otherwise; None if there is none.
        fixed: arguments that are given.

    Raises:
        OptionError: nothing is left to search.
    """
    space: dict[str, Searched] = dict(declared) or dict(_derived(cls, lr))
    space = {name: value for name, value in space.items() if name not in fixed}
    if not space:
        raise OptionError(f"{getattr(cls, '__name__', cls)}: nothing to search; give fewer --optimizer-args")
    return space


def _derived(cls: Callable[..., torch.optim.Optimizer], lr: float | None) -> Iterator[tuple[str, Searched]]:
    parameters = inspect.signature(cls).parameters
    if lr and ("lr" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())):
        yield "lr", LogUniform(_rounded(lr / FACTOR), _rounded(lr * FACTOR))
    roles = introspect.roles(cls) or ({"weight_decay": "weight_decay"} if "weight_decay" in parameters else {})
    for name, role in roles.items():
        default = parameters[name].default if name in parameters else None
        if isinstance(role, tuple) and isinstance(default, tuple):
            yield name, tuple(ROLES[r] if r and value else value for r, value in zip(role, default, strict=True))
        elif isinstance(role, str) and isinstance(default, (int, float)) and (default or role == "weight_decay"):
            yield name, ROLES[role]


def suggest(trial: Trial, space: Mapping[str, Searched]) -> dict[str, Any]:
    """What ``trial`` proposes, as arguments of the constructor."""
    found: dict[str, Any] = {}
    for name, searched in space.items():
        if isinstance(searched, tuple):
            found[name] = tuple(
                _one(trial, key, part) if isinstance(part, Range) else part for key, part in _parts(name, searched)
            )
        else:
            found[name] = _one(trial, name, searched)
    return found


def ranges(space: Mapping[str, Searched]) -> dict[str, Range]:
    """Each number that is searched: ``"lr"``, ``"betas[0]"``."""
    pairs = ((key, part) for name, searched in space.items() for key, part in _parts(name, searched))
    return {key: part for key, part in pairs if isinstance(part, Range)}


def _parts(name: str, searched: Searched) -> Iterator[tuple[str, Any]]:
    if isinstance(searched, tuple):
        yield from ((f"{name}[{i}]", part) for i, part in enumerate(searched))
    else:
        yield name, searched


def _one(trial: Trial, name: str, searched: Range) -> Any:
    if isinstance(searched, Choice):
        return trial.suggest_categorical(name, searched.values)
    if isinstance(searched, Decay):  # Optuna knows no such scale, but that of the complement
        complement = _rounded(trial.suggest_float(f"1 - {name}", 1 - searched.high, 1 - searched.low, log=True))
        return float(f"{1 - complement:.9g}")  # 0.997, not 0.9970000000000001
    value = trial.suggest_float(name, searched.low, searched.high, log=isinstance(searched, LogUniform))
    return _rounded(value)


def first_guess(space: Mapping[str, Searched], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's parameters of a trial with the defaults, or with what is nearest to them in the space."""
    guess: dict[str, Any] = {}
    for name, searched in space.items():
        given = defaults.get(name)
        values = given if isinstance(searched, tuple) and isinstance(given, tuple) else (given,)
        for (key, part), value in zip(_parts(name, searched), values, strict=False):
            if isinstance(part, Choice):
                guess |= {key: value} if value in part.values else {}
            elif isinstance(part, (Uniform, LogUniform, Decay)) and isinstance(value, (int, float)):
                near = min(max(float(value), part.low), part.high)
                guess |= {f"1 - {key}": 1 - near} if isinstance(part, Decay) else {key: near}
    return guess


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def plain(space: Mapping[str, Searched]) -> dict[str, str]:
    """The space as text, for reports and to tell whether two are the same."""
    return {name: f"({', '.join(map(repr, s))})" if isinstance(s, tuple) else repr(s) for name, s in space.items()}
