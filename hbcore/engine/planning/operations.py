"""The operations of a step, in the order in which they run: a flat list, made once for a layout.

An operation is a call without arguments that returns how many kernels it launched: one phase of one segment, a reduction over
ranks or over the whole model, or one level of matrix rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hbcore.distributed.exchange import all_reduce
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.program import NONFINITE, Reduction
from hbcore.engine.offload import Needs, Operation, Operations
from hbcore.engine.planning.finish import finishes
from hbcore.engine.planning.segment_batch import SegmentBatch
from hbcore.engine.stacks.level import Level
from hbcore.rules.transform import Domain

NEUTRAL = {"sum": 0.0, "amax": float("-inf")}
"""What a rank without elements contributes to a reduction."""


def operations_of(batches: Sequence[SegmentBatch], levels: Sequence[Level], core: OptimizerCore) -> Operations:
    """Put every phase of every segment, and every level of matrix rules, in an order in which each finds its inputs.

    A phase that reads a reduction over the model waits until all segments have contributed; a level of matrix rules waits for
    the segments that feed it, and the segments after it wait for the level. Scalar slots are written last. What uses offloaded
    state runs within its journeys.
    """
    operations: list[Operation] = []
    needs: dict[int, Needs] = {}
    contributing = {
        r.name: {b for b in batches if b.segment.program and r in b.segment.program.reductions}
        for b in batches
        for r in reductions(b)
        if r.domain == Domain.MODEL
    }
    done, finished = dict.fromkeys(batches, 0), 0
    while finished < len(levels) or any(k < b.segment.phases for b, k in done.items()):
        for b in batches:
            segment = b.segment  # with as many phases as can run: offloaded state is here then
            while (k := done[b]) < segment.phases and segment.level <= finished and not _waits(b, k, contributing):
                if b.members:
                    assert segment.executable is not None
                    needs[len(operations)] = b.needs(k)
                    operations.append(partial(segment.executable.run, k, b))
                done[b] += 1
                for r in segment.program.phases[k].reduces if segment.program else ():
                    if r.domain == Domain.TENSOR and b.shards is not None:
                        operations.append(partial(_reduce_over_ranks, b, r))
                    if r.domain == Domain.MODEL:
                        contributing[r.name].discard(b)
                        if not contributing[r.name]:
                            operations.append(partial(_reduce_over_model, r, batches, core))
        feeding = (b for b in batches if b.segment.level == finished and b.segment.key.spec.feeds)
        if finished < len(levels) and all(done[b] == b.segment.phases for b in feeding):
            needs[len(operations)] = levels[finished].needs()
            operations.append(partial(levels[finished].run, batches[0].model))
            finished += 1
    return Operations([*operations, *finishes(batches, core)], needs)


def reductions(batch: SegmentBatch) -> Sequence[Reduction]:
    """Every reduction of a batch's program."""
    return batch.segment.program.reductions if batch.segment.program else ()


def _waits(batch: SegmentBatch, phase: int, contributing: dict[str, set[SegmentBatch]]) -> bool:
    program = batch.segment.program
    return program is not None and any(contributing.get(name) for name in program.phases[phase].sums)


def _reduce_over_ranks(batch: SegmentBatch, r: Reduction) -> int:
    """Reduce over the ranks what a phase computed of its part of each tensor."""
    assert batch.shards is not None
    device = batch.everyone[0].local.device
    values = torch.full((len(batch.everyone),), NEUTRAL[r.how], dtype=torch.float64, device=device)
    if batch.here:
        values[batch.here] = torch.stack(batch.sums[r.name]).double()
    all_reduce(values, r.how, batch.shards)
    batch.whole[r.name] = values.to(r.dtype)
    batch.sums[r.name] = list(batch.whole[r.name][batch.here].unbind())
    return 0


def _reduce_over_model(r: Reduction, batches: Sequence[SegmentBatch], core: OptimizerCore) -> int:
    """Make one number of what every segment contributed, and give it to all of them."""
    parts: list[Tensor] = []
    for b in (b for b in batches if any(other.name == r.name for other in reductions(b))):
        own = [x.double() for x in b.sums.get(r.name, ())]
        if r.name == NONFINITE and core.skipping.elsewhere is not None:
            own.append(core.skipping.elsewhere.to(b.segment.key.device))
        device = b.segment.key.device
        part = _reduced(own, r.how) if own else torch.tensor(NEUTRAL[r.how], dtype=torch.float64, device=device)
        if b.shards is not None:
            all_reduce(part, r.how, b.shards)
        parts.append(part.to(parts[0].device) if parts else part)
    result = _reduced(parts, r.how)
    for b in batches:
        b.model[r.name] = result
    if r.name == NONFINITE and not core.settings.capturable:
        core.skipping.send(result)
    return 0


def _reduced(values: list[Tensor], how: str) -> Tensor:
    stacked = torch.stack(values)
    return stacked.sum() if how == "sum" else stacked.amax()
