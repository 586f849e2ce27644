"""One kernel launch a phase for every tensor of every group: the pointer table, the chunks, and what moves between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.backend import Batch, Executable
from hbcore.engine.program import Program
from hbcore.engine.triton_source import Layout, module_source
from hbcore.errors import CompileError
from hbcore.rules.transform import Domain

CHUNK = 8_192
"""Elements a program instance takes. Measured on an H200; a persistent grid is slower."""

CHUNK_REDUCED = 32_768
"""The same where phases reduce: each instance of the next phase sums the partials of its tensor, so there are fewer."""

WARPS = 8


class TritonBackend:
    """Generates, caches and launches kernels. Runs on CUDA tensors, and on the CPU under ``TRITON_INTERPRET=1``."""

    name = "triton"

    def compile(self, program: Program, batch: Batch) -> tuple[Executable, int]:
        """Generate the kernels and compile them for the batch's alignment, launching nothing.

        Raises:
            CompileError: Triton is not installed, there is no GPU, or an operation is outside the generator's vocabulary.
        """
        interpreted = _interpreted()
        if batch.tensors["param"][0].device.type != "cuda" and not interpreted:
            raise CompileError("Triton runs on a GPU, and the parameters are not on one")
        try:
            from hbcore.engine import triton_cache

            module = triton_cache.load(module_source(program, program.label, _version()))
            kernels = [getattr(module, f"phase_{i}") for i in range(len(program.phases))]
            executable = TritonExecutable(program, kernels, interpreted)
            executable.prepare(batch)
        except CompileError:
            raise
        except Exception as error:  # Triton raises what LLVM, ptxas and the driver make of it
            raise CompileError(f"Triton failed: {type(error).__name__}: {str(error).strip()[:300]}") from error
        return executable, executable.compiles


@dataclass
class Launch:
    """The tensors of one batch that share a kernel variant, as the device sees them."""

    members: list[int]
    aligned: bool
    table: Tensor
    chunks: Tensor
    moving: Tensor
    partials: Tensor
    sent: tuple[list[int], list[int]] | None = None


class TritonExecutable:
    """A program's kernels and, for the batch they last ran over, its tables on the device."""

    def __init__(self, program: Program, kernels: Sequence[Any], interpreted: bool) -> None:
        self.program, self.kernels, self.interpreted = program, kernels, interpreted
        self.layout = Layout.of(program)
        self.chunk = CHUNK if len(program.phases) == 1 else CHUNK_REDUCED
        narrow = min(dtype.itemsize for dtype in program.dtypes.values()) < 4
        self.block = 2048 if narrow else 1024
        self.launches: list[Launch] = []
        self.rows: Tensor | None = None
        self.model: Tensor | None = None
        self._batch: Batch | None = None
        self._variants: set[tuple[bool, int]] = set()
        self._sender = Sender()

    @property
    def compiles(self) -> int:
        """How many kernels were compiled: one for each phase and alignment class."""
        return len(self._variants)

    def prepare(self, batch: Batch) -> None:
        """Bring the device's tables up to date with ``batch``, and compile whatever variant it needs."""
        grads = [g.data_ptr() for g in batch.tensors["grad"]]
        loose = {i for i, p in enumerate(grads) if p & 15}
        if self._batch is not batch or loose != self._loose_grads:
            self._plan(batch, loose)
        self._send(batch, grads)
        for launch in self.launches:
            for k, kernel in enumerate(self.kernels):
                if (launch.aligned, k) not in self._variants:
                    self._variants.add((launch.aligned, k))
                    if not self.interpreted:
                        kernel.warmup(*self._arguments(launch), grid=(1,), num_warps=WARPS)

    def run(self, phase: int, batch: Batch) -> int:
        if phase == 0:
            self.prepare(batch)
        self._receive(phase, batch)
        for launch in self.launches:
            grid = (launch.chunks.shape[0],)
            self.kernels[phase][grid](*self._arguments(launch), num_warps=WARPS)
        for r in self.program.phases[phase].reduces:
            if r.domain == Domain.MODEL:
                place = self.layout.reductions.index(r.name)
                partial = [launch.partials[place] for launch in self.launches]
                batch.sums[r.name] = [x.sum() if r.how == "sum" else x.amax() for x in partial]
        return len(self.launches)

    def _arguments(self, launch: Launch) -> tuple[Any, ...]:
        n, chunks = len(launch.members), launch.chunks.shape[0]
        return (launch.table, launch.chunks, launch.moving, self.rows, launch.partials, self.model, n, chunks,
                self.chunk, self.block, launch.aligned)  # fmt: skip

    def _plan(self, batch: Batch, loose_grads: set[int]) -> None:
        """Lay out the tables for a new batch: pointers, sizes and chunks, in one or two alignment classes."""
        self._batch, self._loose_grads = batch, loose_grads
        columns = [[t.data_ptr() for t in batch.tensors[name]] for name in self.layout.columns]
        loose = {i for column in columns for i, p in enumerate(column) if p & 15} | loose_grads
        classes = {True: [i for i in range(len(batch)) if i not in loose], False: sorted(loose)}
        self.launches = [self._launch(batch, members, aligned, columns) for aligned, members in classes.items() if members]

    def _launch(self, batch: Batch, members: list[int], aligned: bool, columns: list[list[int]]) -> Launch:
        device = batch.tensors["param"][0].device
        numels = torch.tensor([batch.tensors["param"][i].numel() for i in members])
        counts = (numels + self.chunk - 1) // self.chunk
        first = counts.cumsum(0) - counts
        of = torch.repeat_interleave(torch.arange(len(members)), counts)
        start = (torch.arange(int(counts.sum())) - first[of]) * self.chunk
        pointers = torch.tensor([[column[i] for i in members] for column in columns], dtype=torch.int64)
        table = torch.cat([pointers, numels[None], first[None], counts[None]]).T.contiguous()
        partials = torch.zeros(max(len(self.layout.reductions), 1), len(of), dtype=torch.float64, device=device)
        moving = torch.zeros(2 * len(members), dtype=torch.int64, device=device)
        return Launch(members, aligned, table.to(device), torch.stack([of, start], 1).to(device), moving, partials)

    def _send(self, batch: Batch, grads: list[int]) -> None:
        """Send the step's scalars, and gradient pointers and row numbers if they moved."""
        device = batch.tensors["param"][0].device
        width = max(self.layout.scalars, 1)
        if self.rows is None or self.rows.shape[0] < len(batch.scalars):
            self.rows = torch.zeros(len(batch.scalars), width, dtype=torch.float64, device=device)
            self.model = torch.zeros(max(len(self.layout.reductions), 1), dtype=torch.float64, device=device)
        if self.layout.scalars:
            rows = torch.stack([torch.stack([s.double() for s in row]) for row in batch.scalars])
            self._sender.send(self.rows[: len(rows)], rows)
        for launch in self.launches:
            whole = len(launch.members) == len(batch)
            pointers = grads if whole else [grads[i] for i in launch.members]
            numbers = batch.rows if whole else [batch.rows[i] for i in launch.members]
            if launch.sent != (pointers, numbers):
                launch.sent = (pointers, list(numbers))
                self._sender.send(launch.moving, torch.tensor([*pointers, *numbers], dtype=torch.int64))

    def _receive(self, phase: int, batch: Batch) -> None:
        """Hand the model's sums to the device, where a phase reads them."""
        for name in self.program.phases[phase].sums:
            if name in batch.model:
                assert self.model is not None
                self.model[self.layout.reductions.index(name)] = batch.model[name]


class Sender:
    """Copies small host tensors to the device without waiting for it, through a ring of pinned buffers."""

    SLOTS = 8

    def __init__(self) -> None:
        self._ring: list[tuple[Tensor, Any]] = []
        self._next = 0

    def send(self, target: Tensor, value: Tensor) -> None:
        """``target.copy_(value)``, asynchronously on a GPU."""
        if target.device.type != "cuda" or value.device.type == "cuda":
            target.copy_(value)
            return
        flat = value.reshape(-1).view(torch.uint8)
        buffer, event = self._slot(flat.numel())
        buffer[: flat.numel()].copy_(flat)
        target.copy_(buffer[: flat.numel()].view(value.dtype).view(value.shape), non_blocking=True)
        event.record()

    def _slot(self, size: int) -> tuple[Tensor, Any]:
        """A pinned buffer whose last copy has ended."""
        if len(self._ring) < self.SLOTS:
            self._ring.append((torch.empty(max(size, 4096), dtype=torch.uint8, pin_memory=True), torch.cuda.Event()))  # type: ignore[no-untyped-call]
            return self._ring[-1]
        self._next = (self._next + 1) % self.SLOTS
        buffer, event = self._ring[self._next]
        event.synchronize()
        if buffer.numel() < size:
            self._ring[self._next] = buffer, event = torch.empty(2 * size, dtype=torch.uint8, pin_memory=True), event
        return buffer, event


def _interpreted() -> bool:
    try:
        from hbcore.engine.triton_helpers import INTERPRETED
    except ImportError as error:
        raise CompileError(f"Triton is not installed ({error})") from error
    return INTERPRETED


def _version() -> str:
    import hbcore

    return hbcore.__version__
