"""Device tables of a batch: tensor addresses, the split into chunks, and this step's numbers.

The first two change only when parameters are added, removed or moved. The numbers change every step and gradient pointers in
most steps; both are in one small buffer, filled by one asynchronous copy from pinned memory per step.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.addresses import as_bytes
from hbcore.engine.backends.base import Batch
from hbcore.engine.backends.triton.codegen import KernelLayout
from hbcore.errors import CompileError

WORD = 8
"""Size in bytes of a scalar (float64), a pointer or a row index (int64)."""

ALIGNED = bytes(range(0, 256, 16))
"""The lowest bytes of addresses that are multiples of 16."""

LOWEST = 0 if sys.byteorder == "little" else WORD - 1


@dataclass
class Launch:
    """The tensors of one batch that share a kernel variant, as the device sees them.

    Attributes:
        members: their indices in the batch.
        aligned: whether every pointer is a multiple of 16 bytes.
        table: int64 ``[tensors, width]``: pointers, element count, first chunk, number of chunks, offset if anything is drawn.
        chunks: int64 ``[chunks, 2]``: tensor, offset of the chunk's first element.
        moving: int64, part of the shared buffer: each tensor's gradient pointer, then scalar rows, then noise keys.
        partials: float64 ``[reductions, chunks]``.
    """

    members: list[int]
    aligned: bool
    table: Tensor
    chunks: Tensor
    moving: Tensor
    partials: Tensor


class Tables:
    """The tables of one batch: one launch for aligned tensors and one for the rest."""

    def __init__(self, batch: Batch, layout: KernelLayout, chunk: int, rows: int) -> None:
        self.layout, self.chunk, self.capacity = layout, chunk, rows
        self.batch = batch
        self.device = batch.tensors["param"][0].device
        self.loose = loose_pointers(batch.tensors["grad"])
        columns = self._columns()
        self.moves = self._moves_of(columns)
        loose = {i for column in columns for i, p in enumerate(column) if p & 15} | self.loose
        classes = {True: [i for i in range(len(batch)) if i not in loose], False: sorted(loose)}
        self.words = 2 + len(layout.noise)
        scalars = rows * max(layout.scalars, 1)
        self.buffer = torch.zeros((scalars + self.words * len(batch)) * WORD, dtype=torch.uint8, device=self.device)
        self.rows = self.buffer[: scalars * WORD].view(torch.float64)
        self.model = torch.zeros(max(len(layout.reductions), 1), dtype=torch.float64, device=self.device)
        moving = self.buffer[scalars * WORD :].view(torch.int64)
        self.launches: list[Launch] = []
        for aligned, members in classes.items():
            if members:
                length = self.words * len(members)
                part, moving = moving[:length], moving[length:]
                self.launches.append(self._launch(members, aligned, columns, part))
        self._start = scalars * WORD
        self._sender = Sender(self.buffer)
        self._sent = b""
        self._sent_rows: list[int] = []

    def fits(self, batch: Batch, pointers: bytes) -> bool:
        """Whether the tables still describe ``batch``, whose gradients are now at ``pointers``, 64 bits each."""
        return (
            batch is self.batch
            and len(batch.values) <= self.capacity
            and (self.loose == loose_pointers(batch.tensors["grad"]) if self.loose else all_aligned(pointers))
        )

    def follow(self) -> None:
        """Update the columns' addresses if any of them moved. Their alignment does not change."""
        if self.moves == self.batch.moves:
            return
        columns = self._columns()
        self.moves = self._moves_of(columns)
        for launch in self.launches:
            pointers = torch.tensor(
                [[column[i] for column in columns] for i in launch.members], dtype=torch.int64, device="cpu"
            )
            if self.device.type == "cuda":  # from pageable memory the copy would wait for the device
                pointers = pointers.pin_memory()
            launch.table[:, : len(columns)].copy_(pointers, non_blocking=True)

    def _moves_of(self, columns: Sequence[Sequence[int]]) -> int:
        """The batch's count of moves, if every tensor has memory; otherwise addresses are to be read again, whatever it is."""
        return self.batch.moves if all(map(all, columns)) else -1

    def _columns(self) -> list[list[int]]:
        """The addresses in each column except gradients."""
        return [[t.data_ptr() for t in self.batch.tensors[name]] for name in self.layout.columns]

    def send(self, pointers: bytes, numbers: Sequence[Sequence[float]]) -> None:
        """Send the step's scalars, one row per entry of ``numbers``, and pointers and row indices if they changed."""
        scalars = [*chain.from_iterable(numbers)]
        data = struct.pack(f"{len(scalars)}d", *scalars)
        alone = len(self.launches) == 1 and self.batch.rows is self._sent_rows and not self.layout.noise
        if pointers != self._sent or not alone:
            # pointers come first: if nothing else changed, only they are sent
            data = data.ljust(self._start, b"\0") + (pointers if alone else self._moving(pointers))
            self._sent, self._sent_rows = pointers, self.batch.rows
        self._sender.send(0, data)

    def send_device(self, pointers: bytes, rows: Sequence[Tensor], capture: bool) -> None:
        """The same for scalars that are on the device, in one 1-d tensor per row.

        In a capture, pointers and rows are copied from a host buffer that only this capture's replays read.
        """
        width = self.layout.scalars
        for i, row in enumerate(rows):
            self.rows[i * width : (i + 1) * width] = row
        if not capture:
            self._sender.spare()
        self._sent = b""  # a replay overwrites the device buffer, so later steps must send everything
        if capture:
            self._sender.record(self._start, self._moving(pointers))
        else:
            self._sender.send(self._start, self._moving(pointers))

    def _moving(self, pointers: bytes) -> bytes:
        """Gradient pointers, row indices and noise keys, launch by launch."""
        columns = [self.batch.rows, *(self.batch.keys[name] for name in self.layout.noise)]
        if len(self.launches) == 1:
            return pointers + as_bytes(*columns)
        columns.insert(0, list(struct.unpack(f"{len(self.batch)}q", pointers)))
        return as_bytes(*([column[i] for i in launch.members] for launch in self.launches for column in columns))

    def _launch(self, members: list[int], aligned: bool, columns: list[list[int]], moving: Tensor) -> Launch:
        numels = torch.tensor([self.batch.tensors["param"][i].numel() for i in members], device="cpu")
        of, start, first, counts = tile(numels, self.chunk)
        pointers = torch.tensor([[column[i] for i in members] for column in columns], dtype=torch.int64, device="cpu")
        rows = [pointers, numels[None], first[None], counts[None]]
        if self.layout.noise:
            starts = self.batch.starts or [0] * len(self.batch)
            rows.append(torch.tensor([[starts[i] for i in members]], dtype=torch.int64, device="cpu"))
        table = torch.cat(rows).T.contiguous()
        partials = torch.zeros(max(len(self.layout.reductions), 1), len(of), dtype=torch.float64, device=self.device)
        chunks = torch.stack([of, start], 1).to(self.device)
        return Launch(members, aligned, table.to(self.device), chunks, moving, partials)


def tile(numels: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut tensors into chunks.

    Args:
        numels: int64 ``[tensors]``.
        chunk: elements per chunk; the last chunk of a tensor may be shorter.

    Returns:
        Per chunk, its tensor and the offset of its first element; per tensor, its first chunk and number of chunks.
    """
    counts = (numels + chunk - 1) // chunk
    first = counts.cumsum(0) - counts
    of = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    start = (torch.arange(int(counts.sum()), device="cpu") - first[of]) * chunk
    return of, start, first, counts


def all_aligned(pointers: bytes) -> bool:
    """Whether all are multiples of 16, in a tenth of the time of checking each one."""
    return not pointers[LOWEST::WORD].translate(None, ALIGNED)


def loose_pointers(tensors: Sequence[Tensor]) -> set[int]:
    """The indices of tensors that do not start at a multiple of 16 bytes."""
    return {i for i, t in enumerate(tensors) if t.data_ptr() & 15}


class Sender:
    """Copies host numbers into a device buffer without waiting for the device, through a ring of pinned buffers."""

    SLOTS = 64
    HALF = SLOTS // 2

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._cuda = target.device.type == "cuda"
        # one allocation for all: each pinning call takes milliseconds
        self._ring = pinned(target, self.SLOTS) if self._cuda else []
        self._addresses = [buffer.data_ptr() for buffer in self._ring]
        self._events: list[Any] = [torch.cuda.Event(), torch.cuda.Event()] if self._cuda else []  # type: ignore[no-untyped-call]
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._spare: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._next = 0

    def spare(self, count: int = 4) -> None:
        """Preallocate up to ``count`` buffers for captures, which may not allocate; refilled by ordinary steps."""
        if self._cuda and len(self._spare) < count:
            self._spare += pinned(self._target, count - len(self._spare))

    def send(self, start: int, data: bytes) -> None:
        """Copy to a byte offset."""
        if not self._cuda:
            ctypes.memmove(self._target.data_ptr() + start, data, len(data))
            return
        half, slot = divmod(self._next, self.HALF)
        if slot == 0:
            self._events[half].synchronize()  # copies from this half of the ring; usually long finished
        ctypes.memmove(self._addresses[self._next] + start, data, len(data))
        key = (self._next, start, len(data))  # views are cached: creating two takes longer than the copy
        views = self._views.get(key)
        if views is None:
            stretch = slice(start, start + len(data))
            views = self._views[key] = (self._target[stretch], self._ring[self._next][stretch])
        views[0].copy_(views[1], non_blocking=True)
        if slot == self.HALF - 1:
            self._events[half].record()
        self._next = (self._next + 1) % self.SLOTS

    def record(self, start: int, data: bytes) -> None:
        """Copy from a dedicated buffer that is never reused, so that replays read the same content."""
        if not self._spare:
            raise CompileError("too many captures in a row; run an ordinary step between them")
        buffer = self._spare.pop()
        self._kept.append(buffer)
        ctypes.memmove(buffer.data_ptr() + start, data, len(data))
        self._target[start:].copy_(buffer[start:], non_blocking=True)


def pinned(like: Tensor, count: int = 1) -> list[Tensor]:
    """``count`` pinned host buffers as large as ``like``."""
    return list(torch.zeros(count, like.numel(), dtype=torch.uint8, device="cpu", pin_memory=True).unbind())
