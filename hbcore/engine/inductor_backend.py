"""torch.compile over the traced graph: C++ on a CPU, and on a GPU where the Triton backend cannot run.

Two dynamic graphs for each phase serve every shape, one compiled for large tensors and one for small ones: Inductor decides
from its first example whether a loop is worth several threads, and a graph made for an embedding wastes them on a bias.
Tensors are passed flat, in their own memory order, so a shape never makes a graph.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hbcore.engine.backend import Batch, Executable, numel_of
from hbcore.engine.layout import flat
from hbcore.engine.program import Phase, Program
from hbcore.errors import CompileError

SMALL = 32_768
"""Tensors of fewer elements go through the small graph. Measured on GPT-2's shapes, two cores."""

Flat = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


class InductorBackend:
    """Compiles each phase twice with ``torch.compile(dynamic=True)``."""

    name = "inductor"

    def compile(self, program: Program, batch: Batch) -> tuple[Executable, int]:
        """Compile for the sizes in ``batch`` by running each graph on throwaway copies of two of its parameters.

        Raises:
            CompileError: there is no C++ compiler, or Inductor does not know an operation.
        """
        if batch.tensors["param"][0].device.type == "cpu" and not compiler_on_path():
            raise CompileError("there is no C++ compiler on PATH (g++, clang++ or cl); install one to compile")
        executable = InductorExecutable(program)
        try:
            executable.warm(batch)
        except Exception as error:  # torch.compile wraps whatever went wrong in one of many private classes
            raise CompileError(f"torch.compile failed: {type(error).__name__}: {first_line(error)}") from error
        return executable, executable.graphs


class InductorExecutable:
    """Each phase as two compiled functions of flat tensors."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._functions = [(_compiled(p), _compiled(p)) for p in program.phases]
        self._warm: set[tuple[int, bool]] = set()

    @property
    def graphs(self) -> int:
        """How many graphs were compiled."""
        return len(self._warm)

    def warm(self, batch: Batch) -> None:
        """Compile what ``batch`` needs and is not compiled yet, writing to copies only."""
        numels = [t.numel() for t in batch.tensors["param"]]
        for small in (False, True):
            fitting = [i for i, n in enumerate(numels) if n > 1 and (n < SMALL) == small]
            if not fitting or (0, small) in self._warm:
                continue
            i = max(fitting, key=numels.__getitem__)
            copies = {name: [torch.empty_like(flat(c[i])[: 1 << 20]).zero_()] for name, c in batch.tensors.items()}
            trial = Batch(copies, [0], [batch.scalars[batch.rows[i]]])
            for k in range(len(self.program.phases)):
                self._run_one(k, trial, 0, small)
                self._warm.add((k, small))

    def run(self, phase: int, batch: Batch) -> int:
        if phase == 0:
            self.warm(batch)
        for reduction in self.program.phases[phase].reduces:
            batch.sums[reduction.name] = []
        for i, param in enumerate(batch.tensors["param"]):
            self._run_one(phase, batch, i, param.numel() < SMALL)
        return 0

    def _run_one(self, phase: int, batch: Batch, i: int, small: bool) -> None:
        p = self.program.phases[phase]
        tensors = [flat(batch.tensors[name][i]) for name in _columns(p)]
        # a length of one would be a graph of its own, and is not worth it
        function = self._functions[phase][small] if batch.tensors["param"][i].numel() > 1 else _in_place(p)
        results = function(tensors, self._numbers(p, batch, i))
        for reduction, value in zip(p.reduces, results, strict=True):
            batch.sums.setdefault(reduction.name, []).append(value)

    def _numbers(self, p: Phase, batch: Batch, i: int) -> list[Tensor]:
        row = batch.scalars[batch.rows[i]]
        numbers = [row[j] for j in p.scalars] + [batch.summed(name, i) for name in p.sums]
        return [*numbers, numel_of(batch.tensors["param"][i])] if p.needs_numel else numbers


def _columns(phase: Phase) -> list[str]:
    """Every tensor the phase touches, once: two views of one storage would keep torch.compile from writing in place."""
    return [*phase.tensors, *(name for name in phase.writes if name not in phase.tensors)]


def _in_place(phase: Phase) -> Flat:
    """The phase as a function of its columns that writes them and returns its reductions."""
    targets = [_columns(phase).index(name) for name in phase.writes]

    def function(tensors: Sequence[Tensor], numbers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        results = phase.graph(*tensors[: len(phase.tensors)], *numbers)
        for target, value in zip(targets, results, strict=False):
            tensors[target].copy_(value)
        reductions: tuple[Tensor, ...] = results[len(phase.writes) :]
        return reductions

    return function


def _compiled(phase: Phase) -> Flat:
    return torch.compile(_in_place(phase), dynamic=True, fullgraph=True)


def compiler_on_path() -> bool:
    """Whether a C++ compiler that Inductor would use is there. Asking first keeps torch.compile from failing halfway."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    return any(shutil.which(name) for name in names) or (sys.platform == "darwin" and shutil.which("clang") is not None)


def first_line(error: BaseException) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
