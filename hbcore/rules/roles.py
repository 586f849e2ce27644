"""Hyperparameter roles, declared with ``hyper(..., role=...)`` and read by the shared options.

``palm=True`` needs the decay rate of the second moment, ``mars=True`` that of the first, and the engine inserts decoupled
weight decay unless a rule has its own. Names are not enough: one rule's ``alpha`` is the decay rate of its second moment,
another's a mixing weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field, fields, replace
from typing import Any

from hbcore.rules.transform import Role, Transform


def values(chain: Iterable[Transform], role: Role) -> Iterator[Any]:
    """The value of every hyperparameter with ``role``, in the chain's order, inner transforms and branches included."""
    for t in chain:
        for f in fields(t):
            value, roles = getattr(t, f.name), _roles(f)
            if roles is None:
                yield from values(_inner(value), role)
            elif isinstance(roles, tuple):
                yield from (v for r, v in zip(roles, value, strict=True) if r == role)
            elif roles == role:
                yield value


def named(chain: Iterable[Transform]) -> dict[str, Role | tuple[Role | None, ...]]:
    """The role of each hyperparameter that has one, by name, inner transforms included."""
    found: dict[str, Role | tuple[Role | None, ...]] = {}
    for t in chain:
        for f in fields(t):
            roles = _roles(f)
            if roles is None:
                found |= named(_inner(getattr(t, f.name)))
            else:
                found[f.name] = roles
    return found


def replaced(chain: Iterable[Transform], role: Role, change: Callable[[Any], Any]) -> tuple[Transform, ...]:
    """The chain with ``change`` applied to every hyperparameter with ``role``; transforms without one stay the same objects."""
    return tuple(_replaced(t, role, change) for t in chain)


def _replaced(t: Transform, role: Role, change: Callable[[Any], Any]) -> Transform:
    new: dict[str, Any] = {}
    for f in fields(t):
        value, roles = getattr(t, f.name), _roles(f)
        if roles is None:
            changed = _walked(value, role, change)
        elif role not in (roles if isinstance(roles, tuple) else (roles,)):
            changed = value
        elif isinstance(roles, tuple):
            changed = tuple(change(v) if r == role else v for r, v in zip(roles, value, strict=True))
        else:
            changed = change(value)
        if changed is not value:
            new[f.name] = changed
    return replace(t, **new) if new else t


def _walked(value: Any, role: Role, change: Callable[[Any], Any]) -> Any:
    """Handle a field without a role; it may hold transforms (an inner rule, the branches of a fork)."""
    if isinstance(value, Transform):
        return _replaced(value, role, change)
    if not isinstance(value, tuple):
        return value
    walked = tuple(_walked(v, role, change) for v in value)
    return value if all(a is b for a, b in zip(walked, value, strict=True)) else walked


def _inner(value: Any) -> Iterator[Transform]:
    if isinstance(value, Transform):
        yield value
    elif isinstance(value, tuple):
        for v in value:
            yield from _inner(v)


def _roles(f: Field[Any]) -> Any:
    """The role of a field, or one for each number of a tuple; None if it has none."""
    if "hyper" in f.metadata and f.name == "weight_decay":  # rules written for API 1.2 or earlier declare no role
        return f.metadata["role"] or "weight_decay"
    return f.metadata.get("role")
