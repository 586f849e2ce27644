"""One call per phase for all tensors of all groups."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from hbcore._version import __version__
from hbcore.engine.backends.base import Batch, Executable, packed
from hbcore.engine.backends.cpp.build import load
from hbcore.engine.backends.cpp.codegen import CHUNK, module_source
from hbcore.engine.backends.cpp.layout import FunctionLayout
from hbcore.engine.graph.program import Program
from hbcore.errors import CompileError
from hbcore.rules.transform import Domain

WORTH_A_THREAD = 32_768
"""Elements for which a thread of its own pays."""

SIGNATURE = (*[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 3)


class CppBackend:
    """Generates C++, and compiles it with the machine's own compiler."""

    name = "cpp"

    def compile(self, program: Program, batch: Batch) -> Executable:
        """Generate, compile and load the program's library.

        Raises:
            CompileError: the parameters are not on a CPU, there is no compiler, or the generator does not support an operation.
        """
        if batch.tensors["param"][0].device.type != "cpu":
            raise CompileError("generated C++ runs on a CPU, and the parameters are not on one")
        library = load(module_source(program, program.label, __version__))
        functions = [getattr(library, f"phase_{i}") for i in range(len(program.phases))]
        for function in functions:
            function.argtypes, function.restype = SIGNATURE, None
        executable = CppExecutable(program, functions)
        executable.prepare(batch)
        return executable


class CppExecutable:
    """A program's functions, and the tables of the batch they last ran over.

    Args:
        program: the program to run.
        functions: one per phase.
    """

    def __init__(self, program: Program, functions: Sequence[Any]) -> None:
        self.program, self.functions = program, functions
        self.compiles = len(functions)
        self.layout = FunctionLayout.of(program)
        self.tables: Tables | None = None

    def prepare(self, batch: Batch) -> None:
        if isinstance(batch.values[0][-1], Tensor):  # then all of them may be tensors
            numbers = [tuple(map(float, self.program.scalars(values))) for values in batch.values]
        else:
            numbers = list(map(self.program.numbers, batch.values))
        if self.tables is None or self.tables.batch is not batch:
            self.tables = Tables(batch, self.layout)
        self.tables.send(numbers)

    def run(self, phase: int, batch: Batch) -> int:
        assert self.tables is not None
        p, tables = self.program.phases[phase], self.tables
        tables.follow()
        for name in p.sums:
            if name in batch.model:
                tables.sums[self.layout.reductions.index(name)] = batch.model[name]
            elif name in batch.sums:  # reduced over the ranks since
                tables.sums[self.layout.reductions.index(name)] = torch.stack(batch.sums[name])
        self.functions[phase](*tables.arguments())
        for r in p.reduces:
            found = tables.sums[self.layout.reductions.index(r.name)]
            if r.domain == Domain.MODEL:
                batch.sums[r.name] = [found.sum() if r.how == "sum" else found.amax()]
            elif batch.numels is not None or (self.program.finish is not None and r.name in self.program.finish.sums):
                batch.sums[r.name] = list(found.to(r.dtype, copy=True).unbind())
        return 1

    def forget(self) -> None:
        """Nothing to do: the tables hold addresses, which are compared with the tensors' own before the next call."""


class Tables:
    """What the functions read of one batch, see :class:`FunctionLayout`.

    Args:
        batch: the batch.
        layout: the program's.

    Attributes:
        sums: float64 ``[reductions, tensors]``.
    """

    def __init__(self, batch: Batch, layout: FunctionLayout) -> None:
        self.batch, self.layout = batch, layout
        sizes = [t.numel() for t in batch.tensors["param"]]
        counts = [-(-size // CHUNK) for size in sizes]
        first = list(accumulate(counts, initial=0))[:-1]
        self._fixed = list(zip(sizes, first, counts, batch.starts or [0] * len(sizes),
                               map(int, batch.numels or sizes), strict=True))  # fmt: skip
        self._chunks = array("q", chain.from_iterable((i, k * CHUNK) for i, n in enumerate(counts) for k in range(n)))
        reductions = max(len(layout.reductions), 1)
        self._partials = torch.zeros(reductions, max(sum(counts), 1), dtype=torch.float64, device="cpu")
        self.sums = torch.zeros(reductions, len(sizes), dtype=torch.float64, device="cpu")
        self._work = sum(sizes) // WORTH_A_THREAD
        self._table, self._moving, self._rows = array("q"), array("q"), array("d")
        self._moves = -1

    def send(self, numbers: Sequence[Sequence[float]]) -> None:
        """Take this step's scalars, one row per entry of ``numbers``."""
        batch = self.batch
        keys = [batch.keys[name] for name in self.layout.noise]
        self._moving = packed(map(Tensor.data_ptr, batch.tensors["grad"]), batch.rows, *keys)
        self._rows = array("d", chain.from_iterable(numbers))

    def follow(self) -> None:
        """Read the columns' addresses again if any of them moved."""
        batch = self.batch
        if self._moves != batch.moves:
            self._moves = batch.moves
            columns = [map(Tensor.data_ptr, batch.tensors[name]) for name in self.layout.columns]
            pointers = list(zip(*columns, strict=True))
            self._table = array("q", chain.from_iterable(chain(*pair) for pair in zip(pointers, self._fixed, strict=True)))

    def arguments(self) -> tuple[int, ...]:
        """What a function is called with."""
        chunks = len(self._chunks) // 2
        return (
            self._table.buffer_info()[0], self._moving.buffer_info()[0], self._rows.buffer_info()[0],
            self._chunks.buffer_info()[0], self._partials.data_ptr(), self.sums.data_ptr(),
            self.sums.shape[1], chunks, max(1, min(torch.get_num_threads(), self._work, chunks)),
        )  # fmt: skip
