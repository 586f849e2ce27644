"""Eager torch, one graph call per chunk: the fallback and the reference for the other backends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hbcore.engine.backends.base import Batch, Executable
from hbcore.engine.backends.chunking import Chunked, Pack, numbers, spreads
from hbcore.engine.graph.program import Phase, Program, as_scalars, direct_reduce
from hbcore.engine.graph.purity import Purity
from hbcore.engine.graph.segment_spec import Reduce, SegmentSpec

SLICE = 262144
"""Elements of a large CPU tensor per call, whole blocks, so that temporaries stay in the cache and memory use is bounded."""


class EagerBackend:
    """Runs each phase's graph with torch's own kernels."""

    name = "eager"

    def compile(self, program: Program, batch: Batch) -> Executable:
        """Wrap the program; nothing is compiled."""
        return EagerExecutable(program, batch.tensors["param"][0].device.type == "cpu")


class EagerExecutable:
    """Calls each phase's graph chunk by chunk; peak memory is one chunk's intermediates.

    Args:
        program: the program to run.
        cpu: whether the parameters are on a CPU.
    """

    def __init__(self, program: Program, cpu: bool) -> None:
        self.program, self.compiles = program, 0
        self._scalars: list[tuple[Tensor, ...]] = []
        self._table: list[tuple[float, ...]] = []
        spread = [cpu and spreads(p, program.dtypes, program.hoisted) for p in program.phases]
        self._spread = any(spread)
        self._chunked = Chunked(program, [p.tensors for p in program.phases], SLICE if cpu else None, spread)
        self._graphs: list[Callable[..., tuple[Tensor, ...]]] = [p.run for p in program.phases]

    def prepare(self, batch: Batch) -> None:
        values = batch.values
        if self._spread and len(values) > 1:  # of most rows, only a column of a pack needs the numbers
            self._scalars, self._table = [], list(map(self.program.numbers, values))
        else:
            self._scalars = list(map(self.program.scalars, values))

    def run(self, phase: int, batch: Batch) -> int:
        p, graph = self.program.phases[phase], self._graphs[phase]
        if not batch.dense:
            self._run_whole(p, batch)
            return 0
        parts: dict[str, list[list[Tensor]]] = {}
        for r in p.reduces:
            parts[r.name] = [[] for _ in range(len(batch))]
        grads = batch.flat("grad")
        for chunk in self._chunked.of(phase, batch):
            scalars = self._scalars[chunk.row] if self._scalars else self.program.scalars(batch.values[chunk.row])
            if isinstance(chunk, Pack) and chunk.rows is not None:
                inputs = chunk.numbers(p, scalars, self._table)
            else:
                inputs = numbers(p, batch, scalars, chunk.index)
            results = graph(*chunk.columns(batch, grads), *inputs)
            chunk.write(results)
            for r, value in zip(p.reduces, results[len(p.writes) :], strict=True):
                parts[r.name][chunk.index].append(value)
        for r in p.reduces:
            join = torch.sum if r.how == "sum" else torch.amax
            batch.sums[r.name] = [join(torch.stack(x)) if len(x) > 1 else x[0] for x in parts[r.name]]
        return 0

    def forget(self) -> None:
        self._chunked.forget()

    def _run_whole(self, p: Phase, batch: Batch) -> None:
        """One call per parameter, in its own shape: for tensors that are not dense in memory."""
        for r in p.reduces:
            batch.sums[r.name] = []
        scalars = self._scalars or list(map(self.program.scalars, batch.values))
        for i, row in enumerate(batch.rows):
            columns = columns_at(batch, i)
            results = p.run(*(columns[name] for name in p.tensors), *numbers(p, batch, scalars[row], i))
            for name, value in zip(p.writes, results, strict=False):
                columns[name].copy_(value)
            for r, value in zip(p.reduces, results[len(p.writes) :], strict=True):
                batch.sums[r.name].append(value)


def columns_at(batch: Batch, i: int) -> dict[str, Tensor]:
    """Parameter ``i``'s tensors in their own shape, noise included."""
    columns = {name: column[i] for name, column in batch.tensors.items()}
    shape = columns["param"].shape
    columns.update({name: batch.noise(name, i, 0, shape.numel()).view(shape) for name in batch.keys})
    return columns


class DirectExecutable:
    """Calls a segment that could not be traced, one parameter at a time. Correct on whole tensors, never fused."""

    def __init__(self, spec: SegmentSpec) -> None:
        self.spec, self.compiles, self._ran = spec, 0, False

    def prepare(self, batch: Batch) -> None:
        """Nothing to prepare."""

    def forget(self) -> None:
        """Nothing is kept."""

    def run(self, phase: int, batch: Batch) -> int:
        rows = [as_scalars(values) for values in batch.values]
        for i, row in enumerate(batch.rows):
            tensors = columns_at(batch, i)
            scalars = dict(zip(self.spec.scalar_names, rows[row], strict=True))
            update = self.spec.update if self._ran else self._watched
            results = update(tensors, scalars, batch.numel(i), direct_reduce)
            given = {id(t) for t in tensors.values()}  # clone results that are another stored tensor before it is overwritten
            results = {name: value.clone() if id(value) in given else value for name, value in results.items()}
            for name, value in results.items():
                tensors[name].copy_(value)
        self._ran = True
        return 0

    def _watched(
        self, tensors: dict[str, Tensor], scalars: dict[str, Tensor], numel: Tensor, reduce: Reduce
    ) -> dict[str, Tensor]:
        """The first run, in which a rule that writes to its arguments is stopped."""
        purity = Purity()
        for tensor in (*tensors.values(), *scalars.values(), numel):
            purity.add(tensor)
        with purity:
            return self.spec.update(tensors, scalars, numel, reduce, purity.give)
