"""How a chain is cut: segments of elementwise transforms, and the matrix rules between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.chain_spec import seen
from hbcore.engine.graph.draws import draw_names
from hbcore.engine.graph.scalar_inputs import numbers
from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.errors import RuleError
from hbcore.rules.contract import slots_of, title
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Domain, Slot, Transform


@dataclass(frozen=True)
class Partition:
    """How parameters of one group and dtype, which take the same branches at the chain's forks, are updated.

    Attributes:
        segments: a spec for each segment; one more than there are matrix rules.
        rules: the index of each matrix rule in the chain.
        transforms: the chain with example numbers.
    """

    segments: tuple[SegmentSpec, ...]
    rules: tuple[int, ...]
    transforms: tuple[Transform, ...]

    @property
    def primes(self) -> bool:
        """Whether the first gradient only prepares the state."""
        return any(t.primes for t in self.transforms)


def partition(spec: SegmentSpec, group: Mapping[str, Any], p: Tensor, promote: bool = False) -> Partition:
    """Cut the chain of ``spec``, whose branches and codec are chosen, at its matrix rules, for parameters like ``p``.

    With ``promote`` the rules receive their updates in the compute dtype, whichever they ask for.
    """
    carried = {name: first for t in spec.whole_chain(example(spec, group)) for name, first in t.scalars().items()}
    spec = replace(spec, carried=tuple(carried))
    transforms = spec.whole_chain(example(spec, group))
    rules = tuple(i for i, t in enumerate(transforms) if t.domain == Domain.MATRIX)
    draws = [draw_names(t) for t in transforms]
    spec = replace(spec, slots=tuple(_slots(t, p) for t in transforms))
    segments: list[SegmentSpec] = []
    takes: torch.dtype | None = None
    start = 0
    for i in rules:
        feeds = _feeds(transforms[i], p, promote)
        segments.append(replace(spec, span=(start, i), takes=takes, feeds=feeds, draws=sum(draws[start:i], ())))
        start, takes = i + 1, dict(feeds)["update"]
    segments.append(replace(spec, span=(start, None), takes=takes, draws=sum(draws[start:], ())))
    return Partition(tuple(segments), rules, transforms)


def example(spec: SegmentSpec, group: Mapping[str, Any]) -> dict[str, float]:
    """Numbers to build a chain with before any step: the group's own, and 1 for what a step adds."""
    values = numbers(spec, group, dict.fromkeys(spec.carried, 1.0))
    return dict(zip(spec.scalar_names, [*values, *[1.0] * 4], strict=False))


def _slots(t: Transform, p: Tensor) -> tuple[tuple[str, Slot], ...]:
    """What segments need to know of a rule's slots, which it is asked with the parameter's own shape."""
    if t.domain == Domain.MATRIX:
        return ()
    return tuple(
        (name, Slot(torch.Size(), exact=slot.exact, scalar=slot.scalar, nonnegative=slot.nonnegative))
        for name, slot in slots_of(t, seen(p)).items()
    )


def _feeds(rule: Transform, p: Tensor, promote: bool) -> tuple[tuple[str, torch.dtype], ...]:
    dtype = compute_dtype(p.dtype)
    works_in: Any = rule.working_dtype(p)
    if not isinstance(works_in, torch.dtype) or not works_in.is_floating_point:
        raise RuleError(f"{title(rule, 'working_dtype')} returned {works_in!r}; return a floating dtype, as torch.bfloat16.")
    return (("update", dtype if promote else works_in), *((name, dtype) for name in sorted(rule.needs - {"hvp"})))
