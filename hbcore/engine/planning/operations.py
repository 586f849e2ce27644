"""The order of a step: lanes and matrix rules as soon as what they read is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.exchange import total
from hbcore.engine.planning.segments import Lane, Work
from hbcore.rules.transform import Domain

NEUTRAL = {"sum": 0.0, "amax": float("-inf")}
"""What a rank without elements contributes to a reduction."""


def run(works: list[Work], levels: int, run_level: Callable[[int], None]) -> int:
    """Run every lane's phases and every level of matrix rules; return how many kernels the lanes launched.

    A phase that reads a sum over the model waits until all lanes have contributed; a level of matrix rules waits for the lanes
    that feed it, and the lanes after it wait for the level.
    """
    waiting = {
        r.name: {id(w) for w in works if w.lane.program and r in reductions(w.lane)}
        for w in works
        for r in reductions(w.lane)
        if r.domain == Domain.MODEL
    }
    done, finished, launches = dict.fromkeys(map(id, works), 0), 0, 0
    while finished < levels or any(done[id(w)] < w.lane.phases for w in works):
        for w in works:
            k = done[id(w)]
            if k == w.lane.phases or w.lane.level > finished or _must_wait(w, k, waiting):
                continue
            if w.entries:
                assert w.lane.executable is not None
                launches += w.lane.executable.run(k, w.batch)
            done[id(w)] += 1
            _join(w, k)
            for r in w.lane.program.phases[k].reduces if w.lane.program else ():
                if r.domain == Domain.MODEL:
                    waiting[r.name].discard(id(w))
                    if not waiting[r.name]:
                        _combine(r.name, r.how, works)
        feeding = (w for w in works if w.lane.level == finished and w.lane.key.recipe.feeds)
        if finished < levels and all(done[id(w)] == w.lane.phases for w in feeding):
            run_level(finished)
            finished += 1
    return launches


def _must_wait(work: Work, phase: int, waiting: dict[str, set[int]]) -> bool:
    program = work.lane.program
    return program is not None and any(waiting.get(name) for name in program.phases[phase].sums)


def reductions(lane: Lane) -> list[Any]:
    """Every reduction of a lane's program."""
    return [r for p in lane.program.phases for r in p.reduces] if lane.program else []


def _join(work: Work, phase: int) -> None:
    """Reduce over the ranks what a phase made of its part of each tensor."""
    if work.shards is None or work.lane.program is None:
        return
    for r in work.lane.program.phases[phase].reduces:
        if r.domain == Domain.TENSOR:
            device = work.everyone[0].local.device
            values = torch.full((len(work.everyone),), NEUTRAL[r.how], dtype=torch.float64, device=device)
            if work.here:
                values[work.here] = torch.stack(work.batch.sums[r.name]).double()
            total(values, r.how, work.shards)
            work.batch.sums[r.name] = list(values[work.here].to(r.dtype).unbind())


def _combine(name: str, how: str, works: list[Work]) -> None:
    """Make one number of what every lane contributed, and give it to all of them."""
    parts: list[Tensor] = []
    for w in (w for w in works if any(r.name == name for r in reductions(w.lane))):
        own = [x.double() for x in w.batch.sums.get(name, ())]
        part = _reduced(own, how) if own else torch.tensor(NEUTRAL[how], dtype=torch.float64, device=w.lane.key.device)
        if w.shards is not None:
            total(part, how, w.shards)
        parts.append(part.to(parts[0].device) if parts else part)
    result = _reduced(parts, how)
    for w in works:
        w.batch.model[name] = result


def _reduced(values: list[Tensor], how: str) -> Tensor:
    stacked = torch.stack(values)
    return stacked.sum() if how == "sum" else stacked.amax()
