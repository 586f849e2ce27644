"""Migration of state from an older version of a rule to the installed one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hbcore.errors import CheckpointError

Convert = Callable[[dict[str, Tensor], float, Mapping[str, Any]], dict[str, Tensor]]
"""``convert(slots, step, group)``: converts one parameter's decoded slots of the rule to the next version."""


@dataclass(frozen=True)
class Migration:
    """One step from a version of a rule to the next; returned by a plugin's ``hb_migrations``.

    Args:
        rule: the transform's name.
        version: the version to convert from; the result is ``version + 1``.
        convert: a pure function of one parameter's slots in the compute dtype, its step and its param group.
    """

    rule: str
    version: int
    convert: Convert


def path(rule: str, saved: int, installed: int, known: Iterable[object], group: int) -> list[Migration]:
    """The migrations from the saved version of a rule to the installed one.

    Raises:
        CheckpointError: there is no such path.
    """
    steps = {m.version: m for m in known if isinstance(m, Migration) and m.rule == rule} if saved != installed else {}
    missing = [v for v in range(saved, installed) if v not in steps]
    if saved > installed or missing:
        raise CheckpointError(
            f"param group {group}: rule {rule!r} was saved at version {saved}, version {installed} is installed, "
            "and no migration leads from one to the other; install the version that wrote it."
        )
    return [steps[v] for v in range(saved, installed)]
