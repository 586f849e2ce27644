"""Plain torch, one parameter at a time: always there, and the truth that the other backends are compared with."""

from __future__ import annotations

from torch import Tensor

from hbcore.engine.backend import Batch, Executable, numel_of
from hbcore.engine.program import Program, as_scalars, direct_reduce
from hbcore.engine.recipe import Recipe


class EagerBackend:
    """Runs each phase's graph with torch's own kernels."""

    name = "eager"

    def compile(self, program: Program, batch: Batch) -> Executable:
        """Nothing to compile."""
        return EagerExecutable(program)


class EagerExecutable:
    """Calls each phase's graph for one parameter after the other; memory peaks at one parameter's intermediates."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scalars: list[tuple[Tensor, ...]] = []

    def prepare(self, batch: Batch) -> int:
        self.scalars = [self.program.scalars(values) for values in batch.values]
        return 0

    def run(self, phase: int, batch: Batch) -> int:
        p = self.program.phases[phase]
        for reduction in p.reduces:
            batch.sums[reduction.name] = []
        for i, row in enumerate(batch.rows):
            args = [batch.tensors[name][i] for name in p.tensors]
            args += [self.scalars[row][j] for j in p.scalars]
            args += [batch.summed(name, i) for name in p.sums]
            if p.needs_numel:
                args.append(numel_of(batch.tensors["param"][i]))
            results = p.graph(*args)
            for name, value in zip(p.writes, results, strict=False):
                batch.tensors[name][i].copy_(value)
            for reduction, value in zip(p.reduces, results[len(p.writes) :], strict=True):
                batch.sums[reduction.name].append(value)
        return 0


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
            scalars = dict(zip(self.recipe.scalar_names, rows[row], strict=True))
            results = self.recipe.update(tensors, scalars, numel_of(tensors["param"]), direct_reduce)
            given = {id(t) for t in tensors.values()}  # a value that is another stored tensor is read before it is written
            results = {name: value.clone() if id(value) in given else value for name, value in results.items()}
            for name, value in results.items():
                tensors[name].copy_(value)
        return 0
