"""What a plan knows of its optimizer, and nothing more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hbcore.engine.graph.segment_spec import Recipe
from hbcore.engine.options import Settings
from hbcore.engine.planning.segments import Group
from hbcore.engine.progress import Progress
from hbcore.engine.report import Report
from hbcore.rules.transform import Transform


@dataclass(frozen=True)
class Surroundings:
    """What a plan knows of its optimizer.

    Attributes:
        groups: the param groups.
        state: the state, which the plan creates slots in.
        progress: what each group carries from step to step; the plan writes to it.
        recipe: param group -> the recipe of its chain, forks unresolved.
        chain: param group -> its transforms, forks unresolved.
        name_of: (group index, parameter index) -> what messages call it.
        identity: (group index, parameter) -> what its noise is drawn by: seed, and name or position.
        report: where to say what runs.
        settings: the options: which backend, whether lanes are shared, whether steps may be captured.
    """

    groups: list[Group]
    state: dict[Tensor, dict[str, Any]]
    progress: list[Progress]
    recipe: Callable[[Group], Recipe]
    chain: Callable[[Group], tuple[Transform, ...]]
    name_of: Callable[[int, int], str]
    identity: Callable[[int, Tensor], str]
    report: Report
    settings: Settings
