"""torch.compile over the traced graph: C++ on a CPU, and on a GPU where the Triton backend cannot run.

Two dynamic graphs for each phase serve every shape, one compiled for large tensors and one for small ones: Inductor decides
from its first example whether a loop is worth several threads, and a graph made for an embedding wastes them on a bias.
Tensors are passed flat, in their own memory order, so a shape never makes a graph.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, fx

from hbcore.engine.backend import Batch, Executable, numel_of
from hbcore.engine.layout import flat
from hbcore.engine.program import Phase, Program
from hbcore.errors import CompileError

SMALL = 32_768
"""Tensors of fewer elements go through the small graph. Measured on GPT-2's shapes, two cores."""

Flat = Callable[..., tuple[Tensor, ...]]


class InductorBackend:
    """Compiles each phase twice with ``torch.compile(dynamic=True)``."""

    name = "inductor"

    def compile(self, program: Program, batch: Batch) -> Executable:
        """Compile for the sizes in ``batch`` by running each graph on throwaway copies of two of its parameters.

        Raises:
            CompileError: there is no C++ compiler, or Inductor does not know an operation.
        """
        if batch.tensors["param"][0].device.type == "cpu" and not compiler_on_path():
            raise CompileError("there is no C++ compiler on PATH (g++, clang++ or cl); install one to compile")
        executable = InductorExecutable(program)
        executable.prepare(batch)
        return executable


class InductorExecutable:
    """Each phase as two compiled functions of flat tensors."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._functions = [(_compiled(p), _compiled(p)) for p in program.phases]
        self._single = [_in_place(p) for p in program.phases]
        self._scalars: list[tuple[Tensor, ...]] = []
        self._warm: set[tuple[int, bool]] = set()

    def warm(self, batch: Batch) -> None:
        """Compile what ``batch`` needs and is not compiled yet, writing to copies only."""
        numels = [t.numel() for t in batch.tensors["param"]]
        for small in (False, True):
            fitting = [i for i, n in enumerate(numels) if n > 1 and (n < SMALL) == small]
            if not fitting or (0, small) in self._warm:
                continue
            i = max(fitting, key=numels.__getitem__)
            copies = {name: [torch.empty_like(flat(c[i])[: 1 << 20]).zero_()] for name, c in batch.tensors.items()}
            trial = Batch(copies, [0], [batch.values[batch.rows[i]]])
            self._scalars = [self.program.scalars(trial.values[0])]
            for k in range(len(self.program.phases)):
                self._run_one(k, trial, 0, small)
                self._warm.add((k, small))

    def prepare(self, batch: Batch) -> int:
        try:
            self.warm(batch)
        except Exception as error:  # torch.compile wraps whatever went wrong in one of many private classes
            raise CompileError(f"torch.compile failed: {type(error).__name__}: {first_line(error)}") from error
        self._scalars = [self.program.scalars(values) for values in batch.values]
        return len(self._warm)

    def run(self, phase: int, batch: Batch) -> int:
        for reduction in self.program.phases[phase].reduces:
            batch.sums[reduction.name] = []
        for i, param in enumerate(batch.tensors["param"]):
            self._run_one(phase, batch, i, param.numel() < SMALL)
        return 0

    def _run_one(self, phase: int, batch: Batch, i: int, small: bool) -> None:
        p = self.program.phases[phase]
        tensors = [flat(batch.tensors[name][i]) for name in _columns(p)]
        # a length of one would be a graph of its own, and is not worth it
        single = batch.tensors["param"][i].numel() == 1
        function = self._single[phase] if single else self._functions[phase][small]
        results = function(*tensors, *self._numbers(p, batch, i))
        for reduction, value in zip(p.reduces, results, strict=True):
            batch.sums.setdefault(reduction.name, []).append(value)

    def _numbers(self, p: Phase, batch: Batch, i: int) -> list[Tensor]:
        row = self._scalars[batch.rows[i]]
        numbers = [row[j] for j in p.scalars] + [batch.summed(name, i) for name in p.sums]
        return [*numbers, numel_of(batch.tensors["param"][i])] if p.needs_numel else numbers


def _columns(phase: Phase) -> list[str]:
    """Every tensor the phase touches, once: two views of one storage would keep torch.compile from writing in place."""
    return [*phase.tensors, *(name for name in phase.writes if name not in phase.tensors)]


def _in_place(phase: Phase) -> Flat:
    """The phase as a module of its columns and numbers that writes the columns and returns the reductions.

    The writes become nodes of the graph, so that each module has code of its own: torch.compile counts recompiles for each
    code object, and one function around all graphs would use up its limit after a few optimizers.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    old = phase.graph.graph
    inputs = [n for n in old.nodes if n.op == "placeholder"]
    columns = dict(zip(phase.tensors, inputs, strict=False))
    targets: dict[str, fx.Node] = {}
    for name in _columns(phase):
        targets[name] = graph.placeholder(f"column_{len(targets)}")
        if name in columns:
            copies[columns[name]] = targets[name]
    for node in inputs[len(phase.tensors) :]:
        copies[node] = graph.placeholder(node.name)
    for node in old.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    results = [copies[n] for n in cast("tuple[fx.Node, ...]", old.output_node().args[0])]
    for name, result in zip(phase.writes, results, strict=False):
        graph.call_function(torch.ops.aten.copy_.default, (targets[name], result))
    graph.output(tuple(results[len(phase.writes) :]))
    return fx.GraphModule(torch.nn.Module(), graph)


def _compiled(phase: Phase) -> Flat:
    compiled: Flat = torch.compile(_in_place(phase), dynamic=True, fullgraph=True)
    return compiled


def compiler_on_path() -> bool:
    """Whether a C++ compiler that Inductor would use is there. Asking first keeps torch.compile from failing halfway."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "cl"]
    return any(shutil.which(name) for name in names) or (sys.platform == "darwin" and shutil.which("clang") is not None)


def first_line(error: BaseException) -> str:
    """The first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and lines[0].endswith("raised:") else next(iter(lines), "no message")
