"""What a step computes once all phases ran: scalar slots, carried numbers that depend on reductions, and what is reported.

A kernel runs over chunks, and a program that reads a scalar must not meet the new value that another one wrote. New values are
therefore computed afterwards, for all parameters of a segment at once: each number is a vector with an element per parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.program import CARRIED, REPORT, Phase, Program
from hbcore.engine.planning.segment_batch import SegmentBatch
from hbcore.rules.transform import Domain


def finishes(batches: Sequence[SegmentBatch], core: OptimizerCore) -> list[Finish]:
    """The operations that write the batches' scalar slots."""
    made: list[Finish] = []
    for b in batches:
        program = b.segment.program
        if program is not None and program.finish is not None:
            made.append(Finish(b, program, program.finish, _idle(b, batches, core)))
    return made


def _idle(batch: SegmentBatch, batches: Sequence[SegmentBatch], core: OptimizerCore) -> dict[str, list[Tensor]]:
    """Numbers of the whole model -> those of the parameters that sit this step out: they stay the same for all."""
    model = {n for t in batch.segment.transforms if t.domain == Domain.MODEL for n in t.slots(batch.everyone[0].param)}
    names = [n for n in batch.segment.key.spec.numbers if n in model]
    active = {m.param for b in batches for m in b.everyone}
    others = [core.state[p] for group in core.groups for p in group["params"] if p not in active and p in core.state]
    return {n: [s[n] for s in others if n in s] for n in names}


class Finish:
    """The operation that writes the scalar slots of one batch.

    Args:
        batch: one whose program has ``finish``.
        idle: numbers of the whole model -> those of the parameters that sit this step out.
    """

    def __init__(self, batch: SegmentBatch, program: Program, phase: Phase, idle: Mapping[str, list[Tensor]]) -> None:
        self._batch, self._program, self._phase, self._idle = batch, program, phase, idle
        self._device = batch.segment.key.device
        self._numels = torch.tensor([float(m.numel) for m in batch.everyone], dtype=torch.float64, device=self._device)
        self._rows: list[int] | None = None
        self._index = self._numels

    def __call__(self) -> int:
        """Compute the new values and write them; carried and reported numbers are left in the batch."""
        batch, phase = self._batch, self._phase
        inputs = [*self._hoisted(), *map(self._vector, phase.sums)]
        results = phase.run(*inputs, self._numels) if phase.needs_numel else phase.run(*inputs)
        for name, value in zip(phase.writes, results, strict=True):
            vector = value.expand(len(batch.everyone))
            if name.startswith(CARRIED):
                batch.carried[name.removeprefix(CARRIED)] = vector
            elif name.startswith(REPORT):
                batch.reported[name.removeprefix(REPORT)] = vector
            else:
                targets = [m.stored[name] for m in batch.everyone]
                torch._foreach_copy_(targets, [*vector.to(targets[0].dtype).unbind()])
                for other in self._idle.get(name, ()):
                    other.copy_(vector[0])
        return 0

    def _hoisted(self) -> Iterator[Tensor]:
        """The program's scalars that are read, as vectors."""
        batch, program = self._batch, self._program
        if self._phase.scalars:
            if self._rows is not batch.every_row:
                self._rows = batch.every_row
                self._index = torch.tensor(self._rows, dtype=torch.int64, device=self._device)
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
