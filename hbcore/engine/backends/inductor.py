"""torch.compile over the traced graph: C++ on a CPU, and on a GPU where the Triton backend cannot run.

Two dynamic graphs per phase serve every shape, one compiled for large tensors and one for small ones: Inductor decides from its
first example whether to run a loop on several threads, and a graph compiled for an embedding wastes them on a bias. Its cache
would reuse one result for every size, so the two differ in example size and in an option.
Tensors are passed flat, in their own memory order, so new shapes need no new graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from hbcore.engine.backends.base import Batch, Executable
from hbcore.engine.backends.chunking import SMALL, Chunked, Pack, columns_of, numbers
from hbcore.engine.backends.compiler import compiler_on_path
from hbcore.engine.graph.program import Phase, Program
from hbcore.errors import CompileError
from hbcore.rules.numerics import compute_dtype
from hbcore.state.blocks import IN_TORCH

Flat = Callable[..., tuple[Tensor, ...]]

EXAMPLE = {False: 1 << 20, True: SMALL // 2}
"""small or not -> number of elements to compile with. The large one is worth a thread on every core."""


class InductorBackend:
    """Compiles each phase twice with ``torch.compile(dynamic=True)``."""

    name = "inductor"

    def compile(self, program: Program, batch: Batch) -> Executable:
        """Compile for the sizes in ``batch`` by running each graph on throwaway copies of two of its parameters.

        Raises:
            CompileError: there is no C++ compiler, or Inductor does not support an operation.
        """
        if batch.tensors["param"][0].device.type == "cpu" and not compiler_on_path():
            raise CompileError("there is no C++ compiler on PATH (g++, clang++ or cl); install one to compile")
        executable = InductorExecutable(program)
        executable.prepare(batch)
        return executable


class InductorExecutable:
    """Each phase as two compiled functions of flat tensors."""

    def __init__(self, program: Program) -> None:
        self.program, self.compiles = program, 0
        self._names = [columns_of(p) for p in program.phases]
        self._chunked = Chunked(program, self._names)
        self._functions = [(_compiled(p, small=False), _compiled(p, small=True)) for p in program.phases]
        self._single = [_in_place(p) for p in program.phases]
        self._scalars: list[tuple[Tensor, ...]] = []
        self._warm: set[tuple[int, bool]] = set()
        self._seen: dict[int, Batch] = {}

    def prepare(self, batch: Batch) -> None:
        self._scalars = list(map(self._hoisted, batch.values))
        try:
            for k, phase in enumerate(self.program.phases):
                self._warm_up(k, phase, batch)
        except Exception as error:  # torch.compile raises one of many private classes
            raise CompileError(f"torch.compile failed: {type(error).__name__}: {first_line(error)}") from error
        self.compiles = len(self._warm)

    def _warm_up(self, k: int, phase: Phase, batch: Batch) -> None:
        """Compile the graphs that ``batch`` still needs, writing only to throwaway tensors."""
        if {(k, False), (k, True)} <= self._warm or self._seen.get(k) is batch:
            return
        grads = batch.flat("grad")
        for chunk in self._chunked.of(k, batch):
            columns = chunk.columns(batch, grads)
            size = columns[0].numel()
            small = size < SMALL
            if size > 1 and (k, small) not in self._warm:
                self._warm.add((k, small))
                length = self.program.length
                blank = [t.new_zeros(length(n, EXAMPLE[small])) for n, t in zip(self._names[k], columns, strict=True)]
                ones = torch.ones((), dtype=compute_dtype(self.program.dtypes["param"]), device="cpu")
                scalars = [self._scalars[chunk.row][j] for j in phase.scalars]
                scalars += [ones] * (len(phase.sums) + phase.needs_numel)
                self._functions[k][small](*blank, *scalars)
        self._seen[k] = batch

    def run(self, phase: int, batch: Batch) -> int:
        p = self.program.phases[phase]
        for r in p.reduces:
            batch.sums[r.name] = []
        grads, names = batch.flat("grad"), self._names[phase]
        for chunk in self._chunked.of(phase, batch):
            columns = chunk.columns(batch, grads)
            # a length of one would specialise another graph; not worth compiling
            size = columns[0].numel()
            function = self._functions[phase][size < SMALL] if size > 1 else self._single[phase]
            results = function(*columns, *numbers(p, batch, self._scalars[chunk.row], chunk.index))
            if isinstance(chunk, Pack):  # the graph wrote to packed copies
                chunk.write([columns[names.index(name)] for name in p.writes])
            for r, value in zip(p.reduces, results, strict=True):
                batch.sums[r.name].append(value)
        return 0

    def forget(self) -> None:
        self._chunked.forget()

    def _hoisted(self, values: Sequence[float | Tensor]) -> tuple[Tensor, ...]:
        """The scalars in the compute dtype: a float64 scalar would keep float32 C++ loops from vectorising."""
        dtype = compute_dtype(self.program.dtypes["param"])
        return tuple(s.to(dtype) if s.is_floating_point() else s for s in self.program.scalars(values))


def _in_place(phase: Phase) -> Flat:
    """The phase as a function of columns and numbers that writes the columns in place and returns the reductions.

    The writes are graph nodes, so that each module has its own code object: torch.compile counts recompiles per code object,
    and one function shared by all graphs would exhaust the limit after a few optimizers.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    old = phase.graph
    inputs = [n for n in old.nodes if n.op == "placeholder"]
    columns = dict(zip(phase.tensors, inputs, strict=False))
    targets: dict[str, fx.Node] = {}
    for name in columns_of(phase):
        targets[name] = graph.placeholder(f"column_{len(targets)}")
        if name in columns:
            copies[columns[name]] = targets[name]
    for node in inputs[len(phase.tensors) :]:
        copies[node] = graph.placeholder(node.name)
    for node in old.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
            copies[node].target = IN_TORCH.get(node.target, node.target)
    results = [copies[n] for n in cast("tuple[fx.Node, ...]", old.output_node().args[0])]
    for name, result in zip(phase.writes, results, strict=False):
        graph.call_function(torch.ops.aten.copy_.default, (targets[name], result))
    graph.output(tuple(results[len(phase.writes) :]))
    # its source stays in linecache: torch.compile wraps functions without one, and counts recompiles of the wrapper
    forward: Flat = fx.GraphModule(torch.nn.Module(), graph).forward
    return forward


def _compiled(phase: Phase, small: bool) -> Flat:
    compiled: Flat = torch.compile(_in_place(phase), dynamic=True, fullgraph=True, options=_options(small))
    return compiled


def _options(small: bool) -> dict[str, Any]:
    """One thread for small tensors, and no compilation besides the graph itself, which took most of the first step.

    By default Inductor compiles a test for each vector instruction set of the CPU. These can only detect a C++ compiler too old
    for the instructions, and such a compiler cannot compile torch's headers either. It also precompiles those headers, which
    pays off from about the fifth graph; most trainings need one or two.
    """
    from torch._inductor import config  # slow to import, and only needed when compiling

    known = config.get_config_copy()
    options: dict[str, Any] = {"cpp.threads": 1} if small else {}
    if known.get("cpp.vec_isa_ok", False) is None:  # set neither by the user nor by the environment
        options["cpp.vec_isa_ok"] = True
    if "cpp_cache_precompile_headers" in known:  # not in every version of torch
        options["cpp_cache_precompile_headers"] = False
    return options


def first_line(error: BaseException) -> str:
    """The first informative line of an error message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and lines[0].endswith("raised:") else next(iter(lines), "no message")
