"""Plain torch: always there, and the truth that the other backends are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from hbcore.engine.backends.base import Batch, Executable
from hbcore.engine.backends.chunking import Piece, pieces
from hbcore.engine.graph.program import Phase, Program, as_scalars, direct_reduce
from hbcore.engine.graph.segment_spec import Recipe

SLICE = 262144
"""Elements of a large CPU tensor that one call takes: its temporaries stay in the cache, and memory does not grow."""


class EagerBackend:
    """Runs each phase's graph with torch's own kernels."""

    name = "eager"

    def compile(self, program: Program, batch: Batch) -> Executable:
        """Nothing to compile."""
        return EagerExecutable(program)


class EagerExecutable:
    """Calls each phase's graph on one piece after the other; memory peaks at one piece's intermediates."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scalars: list[tuple[Tensor, ...]] = []

    def prepare(self, batch: Batch) -> int:
        self.scalars = [self.program.scalars(values) for values in batch.values]
        return 0

    def run(self, phase: int, batch: Batch) -> int:
        p = self.program.phases[phase]
        parts: dict[str, list[list[Tensor]]] = {r.name: [[] for _ in range(len(batch))] for r in p.reduces}
        cpu = batch.tensors["param"][0].device.type == "cpu"
        for piece in pieces(p, batch, SLICE if cpu else None) if batch.dense else _whole(batch):
            results = p.graph(*(piece.columns[name] for name in p.tensors), *self._numbers(p, batch, piece))
            for name, value in zip(p.writes, results, strict=False):
                piece.columns[name].copy_(value)
            piece.scatter()
            for r, value in zip(p.reduces, results[len(p.writes) :], strict=True):
                parts[r.name][piece.index].append(value)
        for r in p.reduces:
            join = torch.sum if r.how == "sum" else torch.amax
            batch.sums[r.name] = [join(torch.stack(x)) if len(x) > 1 else x[0] for x in parts[r.name]]
        return 0

    def _numbers(self, p: Phase, batch: Batch, piece: Piece) -> list[Tensor]:
        row = self.scalars[piece.row]
        numbers = [row[j] for j in p.scalars] + [batch.summed(name, piece.index) for name in p.sums]
        return [*numbers, batch.numel(piece.index)] if p.needs_numel else numbers


def _whole(batch: Batch) -> list[Piece]:
    """One piece for each parameter, in its own shape: for tensors that are not dense in memory."""
    made = []
    for i, row in enumerate(batch.rows):
        columns = {name: column[i] for name, column in batch.tensors.items()}
        shape = columns["param"].shape
        columns.update({name: batch.noise(name, i, 0, shape.numel()).view(shape) for name in batch.keys})
        made.append(Piece(row, i, columns))
    return made


class DirectExecutable:
    """Calls a recipe that could not be traced. Right on whole tensors, never fused."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def prepare(self, batch: Batch) -> int:
        return 0

    def run(self, phase: int, batch: Batch) -> int:
        rows = [as_scalars(values) for values in batch.values]
        for i, row in enumerate(batch.rows):
            tensors = {name: column[i] for name, column in batch.tensors.items()}
            shape = tensors["param"].shape
            tensors.update({name: batch.noise(name, i, 0, shape.numel()).view(shape) for name in batch.keys})
            scalars = dict(zip(self.recipe.scalar_names, rows[row], strict=True))
            results = self.recipe.update(tensors, scalars, batch.numel(i), direct_reduce)
            given = {id(t) for t in tensors.values()}  # a value that is another stored tensor is read before it is written
            results = {name: value.clone() if id(value) in given else value for name, value in results.items()}
            for name, value in results.items():
                tensors[name].copy_(value)
        return 0
