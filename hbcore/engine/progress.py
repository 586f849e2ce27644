"""What a param group carries from step to step: its own count, how many refreshes it is owed, and its rules' scalars."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hbcore.rules.transform import Domain, Transform

Progress = dict[str, float]
"""``step`` is how many steps the group took; ``<rule>.refreshes`` the sum of the rule's rates; the rest are scalars."""

SLACK = 2**-10
"""A sum of rates this close below a whole number counts as having reached it: ten times 0.1 is less than 1."""


def advanced(progress: Progress, transforms: Iterable[Transform]) -> tuple[Progress, dict[str, bool]]:
    """The progress after a step, but for the rules' scalars, and of each matrix rule whether it refreshes."""
    k = progress.get("step", 0.0) + 1
    after, refresh = {**progress, "step": k}, {}
    for t in transforms:
        if t.domain == Domain.MATRIX and t.name not in refresh:
            key = f"{t.name}.refreshes"
            before = progress.get(key, 0.0)
            after[key] = before + t.rate(int(k))
            refresh[t.name] = math.floor(after[key] + SLACK) > math.floor(before + SLACK)
    return after, refresh


def carried(progress: Progress, transforms: Iterable[Transform]) -> dict[str, float]:
    """The rules' scalars, with their first values where the group carries none yet."""
    return {name: progress.get(name, first) for t in transforms for name, first in t.scalars().items()}
