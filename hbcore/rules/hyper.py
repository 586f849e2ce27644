"""Hyperparameters of rules: fields that may change every step, their bounds, and what they mean."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal, get_args

from hbcore.errors import RuleError
from hbcore.rules.bounds import Bounds

Role = Literal["first_moment", "second_moment", "weight_decay"]
"""The meaning of a hyperparameter to its rule: the decay rate of a first or second moment, or the weight decay."""


def hyper(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    role: Role | tuple[Role | None, ...] | None = None,
) -> Any:
    """Declare a dataclass field that may change every step without recompilation.

    Inside ``update`` the field is a 0-d float64 tensor (a tuple of them for a tuple default), bound to the param group's
    entry of the same name, so schedulers that write ``group["lr"]`` just work. Fields declared without ``hyper`` are
    structural: changing one builds another graph. Bounds are checked at construction.

    Args:
        default: a number, or a tuple of numbers.
        ge, gt, le, lt: bounds of each number.
        role: the meaning of the number; for a tuple, one role or None per number. ``palm=True`` replaces every
            ``"second_moment"``, ``mars=True`` reads the first ``"first_moment"``, and a rule with a ``"weight_decay"`` decays
            the weights itself. An option is refused if no hyperparameter has the role it needs.

    Raises:
        RuleError: a role does not exist, or the numbers and roles of a tuple differ in length.
    """
    each = role if isinstance(role, tuple) else (role,)
    if unknown := [r for r in each if r is not None and r not in get_args(Role)]:
        raise RuleError(f"hyper(role={unknown[0]!r}): no such role; pass one of {', '.join(get_args(Role))}.")
    numbers = default if isinstance(default, tuple) else (default,)
    if role is not None and (isinstance(role, tuple) != isinstance(default, tuple) or len(each) != len(numbers)):
        raise RuleError(f"hyper({default!r}, role={role!r}): pass one role for a number, a tuple of equal length for a tuple.")
    return field(default=default, metadata={"hyper": Bounds(ge, gt, le, lt), "role": role})
