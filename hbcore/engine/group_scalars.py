"""What a param group carries from step to step: its own count of steps, the refreshes that are due, and its rules' scalars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from hbcore.rules.transform import Domain, Transform

GroupScalars = dict[str, float]
"""``step`` is how many steps the group took; ``<rule>.refreshes`` the sum of the rule's rates; the rest are scalars."""

SLACK = 2**-10
"""A sum of rates this close below a whole number counts as having reached it: ten times 0.1 is less than 1."""


def advanced(scalars: GroupScalars, transforms: Iterable[Transform]) -> tuple[GroupScalars, dict[str, bool]]:
    """What the group carries after a step, its rules' scalars excepted, and for each matrix rule whether it refreshes."""
    k = scalars.get("step", 0.0) + 1
    after, refresh = {**scalars, "step": k}, {}
    for t in transforms:
        if t.domain == Domain.MATRIX and t.name not in refresh:
            key = f"{t.name}.refreshes"
            before = scalars.get(key, 0.0)
            after[key] = before + t.rate(int(k))
            refresh[t.name] = math.floor(after[key] + SLACK) > math.floor(before + SLACK)
    return after, refresh


def carried(scalars: Mapping[str, float], transforms: Iterable[Transform]) -> dict[str, float]:
    """The rules' scalars, with their first values where the group carries none yet."""
    return {name: scalars.get(name, first) for t in transforms for name, first in t.scalars().items()}
