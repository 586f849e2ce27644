"""The course of a parameter through its chain: lanes of elementwise transforms, and the matrix rules between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.graph.scalar_inputs import numbers
from hbcore.engine.graph.segment_spec import Recipe
from hbcore.errors import RuleError
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Domain, Transform


@dataclass(frozen=True)
class Course:
    """How parameters of one group, dtype and way through the chain's forks are updated.

    Attributes:
        lanes: a recipe for each lane; one more than there are matrix rules.
        rules: the matrix rules' places in the chain.
        transforms: the chain with example numbers.
    """

    lanes: tuple[Recipe, ...]
    rules: tuple[int, ...]
    transforms: tuple[Transform, ...]

    @property
    def primes(self) -> bool:
        """Whether the first gradient only prepares the state."""
        return any(t.primes for t in self.transforms)


def course(recipe: Recipe, group: Mapping[str, Any], p: Tensor, promote: bool = False) -> Course:
    """Cut the chain of ``recipe``, whose branches are chosen, at its matrix rules, for parameters like ``p``.

    With ``promote`` the rules receive their updates in the compute dtype, whichever they ask for.
    """
    carried = {name: first for t in recipe.whole_chain(example(recipe, group)) for name, first in t.scalars().items()}
    recipe = replace(recipe, carried=tuple(carried))
    transforms = recipe.whole_chain(example(recipe, group))
    rules = tuple(i for i, t in enumerate(transforms) if t.domain == Domain.MATRIX)
    lanes: list[Recipe] = []
    takes: torch.dtype | None = None
    start = 0
    for i in rules:
        feeds = _feeds(transforms[i], p, promote)
        lanes.append(replace(recipe, span=(start, i), takes=takes, feeds=feeds))
        start, takes = i + 1, dict(feeds)["update"]
    lanes.append(replace(recipe, span=(start, None), takes=takes))
    return Course(tuple(lanes), rules, transforms)


def example(recipe: Recipe, group: Mapping[str, Any]) -> dict[str, float]:
    """Numbers to look at a chain with: the group's own, and 1 for what a step adds."""
    values = numbers(recipe, group, dict.fromkeys(recipe.carried, 1.0))
    return dict(zip(recipe.scalar_names, [*values, *[1.0] * 4], strict=False))


def _feeds(rule: Transform, p: Tensor, promote: bool) -> tuple[tuple[str, torch.dtype], ...]:
    if unknown := rule.needs - {"grad", "param"}:
        raise RuleError(f"rule {rule.name!r} needs {sorted(unknown)}, which this version cannot give it.")
    dtype = compute_dtype(p.dtype)
    return (("update", dtype if promote else rule.working_dtype(p)), *((name, dtype) for name in sorted(rule.needs)))
