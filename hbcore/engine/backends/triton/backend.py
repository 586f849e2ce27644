"""One kernel launch per phase for all tensors of all groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hbcore._version import __version__
from hbcore.engine.addresses import Pointers
from hbcore.engine.backends.base import Batch, Executable
from hbcore.engine.backends.triton.codegen import LIGHT, KernelLayout, module_source
from hbcore.engine.backends.triton.launch_tables import Launch, Tables
from hbcore.engine.graph.phases import traffic
from hbcore.engine.graph.program import NOISE, Program, Reduction
from hbcore.engine.graph.scalar_inputs import capturing
from hbcore.errors import CompileError
from hbcore.rules.direct_launch import launcher_of
from hbcore.rules.launching import on
from hbcore.rules.transform import Domain
from hbcore.state.blocks import BLOCK

VECTOR = 16
"""Bytes that a thread writes at once of the widest tensor. With more, a store passes through shared memory."""

WARPS, WARPS_LIGHT = 8, 4
"""Warps in a program instance; fewer where a phase moves so little that arithmetic takes as long as memory, and waits less for
others then. Measured on an H200 like the rest, with AdamW: 0.69 ms instead of 0.73 with everything in bf16+8."""

WARPS_BLOCKS, REGISTERS_BLOCKS = 1, 72
"""The same, and registers of a thread at most, where blocks of a codec share numbers: those pass through shared memory, where
the warps of one program instance would wait for each other. 0.61 ms instead of 0.63 with state in 8 bits."""

SLIM = 17
"""Bytes an element up to which a thread takes twice as many elements: 0.64 ms instead of 0.70 with state in 8 bits."""

BLOCKS = 2
"""Blocks in a chunk, which a program instance processes: GPT-2 in float32 at 0.95 of copy speed, against 0.92 with 8."""

BLOCKS_DECODED = 4
"""The same where something is decoded from integers, which takes longer to get going."""

CHUNK_REDUCED = 16_384
"""Elements in a chunk with reductions: each instance of the next phase sums its tensor's partials, so there should be fewer."""

REGISTERS = 128
"""Registers of a thread at most, so that a multiprocessor holds 16 warps."""

TAILS = 8
"""The blocks at the end of a tensor, with masks, are smaller by this factor."""


class TritonBackend:
    """Generates, caches and launches kernels. Runs on CUDA tensors, and on the CPU under ``TRITON_INTERPRET=1``."""

    name = "triton"

    def compile(self, program: Program, batch: Batch) -> Executable:
        """Generate the kernels and compile them for the batch's alignment, launching nothing.

        Raises:
            CompileError: Triton is not installed, there is no GPU, or the generator does not support an operation.
        """
        interpreted = _interpreted()
        if batch.tensors["param"][0].device.type != "cuda" and not interpreted:
            raise CompileError("Triton runs on a GPU, and the parameters are not on one")
        from hbcore.engine.backends.triton import cache as triton_cache

        module = triton_cache.load(module_source(program, program.label, __version__))
        kernels = [getattr(module, f"phase_{i}") for i in range(len(program.phases))]
        executable = TritonExecutable(program, kernels, interpreted)
        executable.prepare(batch)
        return executable


class TritonExecutable:
    """A program's kernels, and the device tables of the batch they last ran over."""

    def __init__(self, program: Program, kernels: Sequence[Any], interpreted: bool) -> None:
        self.program, self.kernels, self.interpreted = program, kernels, interpreted
        self.compiles = 0
        self.layout = KernelLayout.of(program)
        written = [program.dtypes[n].itemsize for p in program.phases for n in p.writes if n not in program.per_block]
        moved = max(traffic([p], program.dtypes, program.per_block) for p in program.phases)
        self.warps = WARPS_BLOCKS if program.per_block else WARPS_LIGHT if moved <= LIGHT else WARPS
        self.registers = REGISTERS_BLOCKS if program.per_block else REGISTERS
        self.block = VECTOR // max(written, default=4) * 32 * self.warps * (2 if moved <= SLIM else 1)
        decoded = not all(d.is_floating_point for name, d in program.dtypes.items() if not name.startswith(NOISE))
        self.chunk = CHUNK_REDUCED if len(program.phases) > 1 else self.block * (BLOCKS_DECODED if decoded else BLOCKS)
        # integer codecs must match eager torch bit for bit: a fused multiply-add rounds once less
        self.fusion = not decoded
        self.tables: Tables | None = None
        self._variants: dict[tuple[bool, int], Any] = {}
        self._launches: dict[int, list[Callable[[], Any]]] = {}  # by phase, bound to the present tables
        self._pointers = Pointers()
        self._captured: list[Tables] = []  # captured graphs point into these tables, so keep them alive

    def prepare(self, batch: Batch) -> None:
        """Update the device tables for ``batch``, and compile missing variants."""
        with on(batch.tensors["param"][0].device):
            self._prepare(batch)

    def _prepare(self, batch: Batch) -> None:
        pointers = self._pointers.of(batch.tensors["grad"])
        if self.tables is None or not self.tables.fits(batch, pointers):
            self.tables, self._launches = Tables(batch, self.layout, self.chunk, rows=len(batch.values)), {}
        self.tables.follow()
        if isinstance(batch.values[0][-1], Tensor):  # then all of them may be on the device
            rows = [torch.stack([s.double() for s in self.program.scalars(values)]) for values in batch.values]
            self.tables.send_device(pointers, rows if self.layout.scalars else [], capturing())
            if capturing():
                self._captured.append(self.tables)
        else:
            self.tables.send(pointers, list(map(self.program.numbers, batch.values)))
        for launch in self.tables.launches:
            for k in range(len(self.kernels)):
                if (launch.aligned, k) not in self._variants:
                    self._variants[launch.aligned, k] = self._compiled(k, launch)
        self.compiles = len(self._variants)

    def run(self, phase: int, batch: Batch) -> int:
        assert self.tables is not None
        self.tables.follow()
        for name in self.program.phases[phase].sums:
            if name in batch.model:
                self.tables.model[self.layout.reductions.index(name)] = batch.model[name]
        with on(self.tables.device):  # also where a kernel is loaded
            launches = self._launches.get(phase) or self._bind(phase)
            for launch in launches:
                launch()
        for r in self.program.phases[phase].reduces:
            if r.domain == Domain.MODEL:
                index = self.layout.reductions.index(r.name)
                partials = [launch.partials[index] for launch in self.tables.launches]
                batch.sums[r.name] = [x.sum() if r.how == "sum" else x.amax() for x in partials]
            elif self.program.finish is not None and r.name in self.program.finish.sums:
                batch.whole[r.name] = self._per_tensor(self.layout.reductions.index(r.name), r)
        return len(launches)

    def _per_tensor(self, index: int, r: Reduction) -> Tensor:
        """A reduction's results, an element for each parameter, from those of its chunks."""
        assert self.tables is not None
        results: dict[int, Tensor] = {}
        for launch in self.tables.launches:
            how = "sum" if r.how == "sum" else "max"
            counts = launch.table[:, len(self.layout.columns) + 2]
            values = torch.segment_reduce(launch.partials[index], how, lengths=counts, unsafe=True)  # checks would wait
            if len(self.tables.launches) == 1:  # of all tensors, in order
                return values.to(r.dtype)
            results.update(zip(launch.members, values.to(r.dtype).unbind(), strict=True))
        return torch.stack([results[i] for i in range(len(results))])

    def forget(self) -> None:
        """Nothing to do: the tables hold addresses, which are compared with the tensors' own before the next launch."""

    def _bind(self, phase: int) -> list[Callable[[], Any]]:
        """The launches of one phase as calls without arguments.

        A compiled kernel takes addresses for tensors, whose addresses it would ask for at every launch. The tables are alive
        for as long as the launches are.
        """
        assert self.tables is not None
        self._launches[phase] = []
        for launch in self.tables.launches:
            arguments, grid = self._arguments(launch), (launch.chunks.shape[0], 1, 1)
            kernel = self._variants[launch.aligned, phase]
            if self.interpreted:
                self._launches[phase].append(partial(kernel[grid], *arguments))
                continue
            addresses = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
            self._launches[phase].append(partial(launcher_of(kernel, self.tables.device.index), grid, addresses))
        return self._launches[phase]

    def _compiled(self, phase: int, launch: Launch) -> Any:
        """The kernel of one phase and alignment class; once compiled it is launched without Triton's own lookup."""
        kernel = self.kernels[phase]
        if self.interpreted:
            return kernel
        try:
            for block, options in self.attempts():
                made = kernel.warmup(*self._arguments(launch, block), grid=(1,), **options)
                _ = getattr(made, "run", None)  # loads it, which tells its registers
                if self.accepts(options, getattr(made, "n_regs", None) or 0, getattr(made, "n_spills", None) or 0):
                    break
            return made
        except Exception as error:  # errors from Triton, LLVM, ptxas or the driver
            raise CompileError(f"Triton failed: {type(error).__name__}: {str(error).strip()[:300]}") from error

    def attempts(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The block to compile with, and Triton's options: smaller blocks, and a limit at last, until registers suffice.

        The limit is no option from the start: ptxas would take it for an invitation, and use more in every kernel.
        """
        options = {"num_warps": self.warps, "enable_fp_fusion": self.fusion}
        yield self.block, options
        yield self.block // 2, options
        if not torch.version.hip:
            for most in dict.fromkeys((self.registers, REGISTERS)):
                yield self.block // 2, {**options, "maxnreg": most}

    def accepts(self, options: dict[str, Any], registers: int, spilled: int) -> bool:
        """Whether a kernel that was compiled with ``options`` is the one to run: no further attempt is made then.

        Args:
            options: an attempt's.
            registers: of each thread.
            spilled: what it keeps in memory for lack of more. A kernel without a limit may do so around a function call.
        """
        return registers <= self.registers and not (spilled and options.get("maxnreg", REGISTERS) < REGISTERS)

    def _arguments(self, launch: Launch, block: int | None = None) -> tuple[Any, ...]:
        tables, block = self.tables, block or self.block
        assert tables is not None
        return (
            launch.table, launch.chunks, launch.moving, tables.rows, launch.partials, tables.model,
            len(launch.members), launch.chunks.shape[0], *self.constants(block, launch.aligned).values(),
        )  # fmt: skip

    def constants(self, block: int, aligned: bool) -> dict[str, int]:
        """What a kernel is compiled for, in the order of its arguments."""
        return {"CHUNK": self.chunk, "BLOCK": block, "TAIL": max(block // TAILS, BLOCK), "ALIGNED": aligned}


def _interpreted() -> bool:
    try:
        from hbcore.engine.backends.triton.device_lib import INTERPRETED
    except ImportError as error:
        raise CompileError(f"Triton is not installed ({error})") from error
    return INTERPRETED
