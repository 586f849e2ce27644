"""What a step computes once all phases ran: scalar slots, and carried numbers that depend on reductions.

A kernel runs over chunks, and a program that reads a scalar must not meet the new value that another one wrote. New values are
therefore computed afterwards, for all parameters of a segment at once: each number is a vector with an element per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hbcore.engine.graph.program import CARRIED, Phase, Program
from hbcore.engine.planning.segments import SegmentBatch


class Finish:
    """The operation that writes the scalar slots of one batch.

    Args:
        batch: one whose program has :attr:`~hbcore.engine.graph.program.Program.finish`.
    """

    def __init__(self, batch: SegmentBatch, program: Program, phase: Phase) -> None:
        self._batch, self._program, self._phase = batch, program, phase
        self._device = batch.segment.key.device
        self._numels = torch.tensor([float(m.numel) for m in batch.everyone], dtype=torch.float64, device=self._device)
        self._rows: list[int] | None = None
        self._index = self._numels

    def __call__(self) -> int:
        """Compute the new values and write them; carried numbers are left in ``batch.carried``."""
        batch, phase = self._batch, self._phase
        inputs = [*self._hoisted(), *map(self._vector, phase.sums)]
        results = phase.graph(*inputs, self._numels) if phase.needs_numel else phase.graph(*inputs)
        for name, value in zip(phase.writes, results, strict=True):
            vector = value.expand(len(batch.everyone))
            if name.startswith(CARRIED):
                batch.carried[name.removeprefix(CARRIED)] = vector
            else:
                targets = [m.stored[name] for m in batch.everyone]
                torch._foreach_copy_(targets, [*vector.to(targets[0].dtype).unbind()])
        return 0

    def _hoisted(self) -> Iterator[Tensor]:
        """The program's scalars that are read, as vectors."""
        batch, program = self._batch, self._program
        if self._rows is not batch.every_row:
            self._rows = batch.every_row
            self._index = torch.tensor(self._rows, dtype=torch.int64, device=self._device)
        if self._phase.scalars:
            rows = [torch.stack([s.double() for s in program.scalars(values)]) for values in batch.values]
            table = torch.stack(rows).to(self._device)[self._index]
            for i in self._phase.scalars:
                yield table[:, i].to(program.hoisted[i])

    def _vector(self, name: str) -> Tensor:
        """A reduction's results, or a scalar slot's present values."""
        batch = self._batch
        if name in batch.model:
            return batch.model[name].to(self._device).expand(len(batch.everyone))
        if name in batch.whole:
            return batch.whole[name]
        if name in batch.sums:
            return torch.stack(batch.sums[name])
        return torch.stack([m.stored[name] for m in batch.everyone])
