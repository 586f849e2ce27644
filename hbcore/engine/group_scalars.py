"""What a param group carries from step to step: its own count of steps, the refreshes that are due, and its rules' scalars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hbcore.rules.transform import Domain, Transform

GroupScalars = dict[str, float]
"""``step`` is how many steps the group took; ``<rule>.refreshes`` the sum of the rule's rates; the rest are scalars."""

SLACK = 2**-10
"""A sum of rates this close below a whole number counts as having reached it: ten times 0.1 is less than 1."""


class Due(NamedTuple):
    """The sum of a rule's rates before a step and after it."""

    before: float
    after: float

    @property
    def whole(self) -> bool:
        """Whether the rule refreshes: the sum passes a whole number."""
        return self.at(0.0)

    def asks(self, interval: int) -> bool:
        """Whether the rule refreshes for the first time, or for the ``interval``-th since it last had a product."""
        return self.whole and (math.floor(self.after + SLACK) - 1) % interval == 0

    def at(self, phase: float) -> bool:
        """The same for matrices that are ahead of the others by ``phase``, in [0, 1)."""
        return math.floor(self.after + phase + SLACK) > math.floor(self.before + phase + SLACK)


def advanced(scalars: GroupScalars, transforms: Iterable[Transform]) -> tuple[GroupScalars, dict[str, Due]]:
    """What the group carries after a step, its rules' scalars excepted, and for each matrix rule whether it refreshes."""
    k = scalars.get("step", 0.0) + 1
    after, due = {**scalars, "step": k}, dict[str, Due]()
    for t in transforms:
        if t.domain == Domain.MATRIX and t.name not in due:
            key = f"{t.name}.refreshes"
            before = scalars.get(key, 0.0)
            after[key] = before + t.rate(int(k))
            due[t.name] = Due(before, after[key])
    return after, due


def carried(scalars: Mapping[str, float], transforms: Iterable[Transform]) -> dict[str, float]:
    """The rules' scalars, with their first values where the group carries none yet."""
    return {name: scalars.get(name, first) for t in transforms for name, first in t.scalars().items()}
