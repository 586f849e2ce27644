"""How a batch is handed to a graph that takes flat tensors, one call for each piece.

A call costs microseconds whatever it computes, and a temporary that leaves the cache costs a trip to memory. So small tensors
that share their scalars are packed into one piece, and, for plain torch on a CPU, large ones are cut into slices that fit the
cache. Reductions are per tensor: where a phase makes or reads one, a piece never holds more than one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hbcore.engine.backends.base import Batch
from hbcore.engine.graph.program import NOISE, Phase

SMALL = 32_768
"""Tensors of fewer elements are packed. Packing larger ones costs more in copies than it saves in calls."""


@dataclass
class Piece:
    """Some elements of a batch.

    Attributes:
        row: which scalars they take.
        index: the parameter they belong to; for a pack, its first.
        columns: stored tensor -> flat tensor.
        targets: stored tensor -> where a pack's parts go; empty where the columns are views.
    """

    row: int
    index: int
    columns: dict[str, Tensor]
    targets: dict[str, list[Tensor]] = field(default_factory=dict)

    def scatter(self) -> None:
        """Copy a pack's columns back to the tensors they were made of."""
        for name, parts in self.targets.items():
            torch._foreach_copy_(parts, list(torch.split(self.columns[name], [p.numel() for p in parts])))


def columns_of(phase: Phase) -> list[str]:
    """Every stored tensor the phase touches, once."""
    return [*phase.tensors, *(name for name in phase.writes if name not in phase.tensors)]


def pieces(phase: Phase, batch: Batch, slice_: int | None = None) -> Iterator[Piece]:
    """Cut ``batch`` for one phase.

    Args:
        phase: what will run.
        batch: tensors that are dense in memory.
        slice_: the largest piece, in elements; None for whole tensors.
    """
    names = columns_of(phase)
    flat = {name: batch.flat(name) for name in names if not name.startswith(NOISE)}
    sizes = [t.numel() for t in batch.tensors["param"]]

    def part(name: str, i: int, start: int, length: int) -> Tensor:
        if name.startswith(NOISE):
            return batch.noise(name, i, start, length)
        return flat[name][i] if length == sizes[i] else flat[name][i][start : start + length]

    packs: dict[int, list[int]] = {}
    alone = list(range(len(sizes)))
    if not phase.reduces and not phase.sums and not phase.needs_numel:
        for i in (i for i in alone if sizes[i] < SMALL):
            packs.setdefault(batch.rows[i], []).append(i)
        alone = [i for i in alone if sizes[i] >= SMALL]
    for row, members in packs.items():
        columns = {name: torch.cat([part(name, i, 0, sizes[i]) for i in members]) for name in names}
        yield Piece(row, members[0], columns, {name: [flat[name][i] for i in members] for name in phase.writes})
    for i in alone:
        step = slice_ or sizes[i]
        for start in range(0, sizes[i], step):
            length = min(step, sizes[i] - start)
            yield Piece(batch.rows[i], i, {name: part(name, i, start, length) for name in names})
