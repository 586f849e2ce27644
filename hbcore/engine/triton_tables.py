"""What the device reads of a batch: where its tensors are, how they are cut into chunks, and the numbers of this step.

The first two change when parameters come, go or move. The numbers change every step, and gradient pointers in most; both lie
in one small buffer that a step fills with one asynchronous copy from pinned memory.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import or_
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.backend import Batch
from hbcore.engine.triton_source import Layout

WORD = 8
"""Bytes of a scalar (float64), of a pointer and of a row number (int64)."""


@dataclass
class Launch:
    """The tensors of one batch that share a kernel variant, as the device sees them.

    Attributes:
        members: their places in the batch.
        aligned: whether every pointer is a multiple of 16 bytes.
        table: int64 ``[tensors, columns + 3]``: pointers, element count, first chunk, number of chunks.
        chunks: int64 ``[chunks, 2]``: tensor, offset of the chunk's first element.
        moving: int64 ``[2 * tensors]``, part of the shared buffer: gradient pointers, then scalar rows.
        partials: float64 ``[reductions, chunks]``.
    """

    members: list[int]
    aligned: bool
    table: Tensor
    chunks: Tensor
    moving: Tensor
    partials: Tensor


class Tables:
    """The tables of one batch, in one launch for aligned tensors and one for the rest."""

    def __init__(self, batch: Batch, layout: Layout, chunk: int, rows: int) -> None:
        self.layout, self.chunk, self.capacity = layout, chunk, rows
        self.batch = batch
        self.device = batch.tensors["param"][0].device
        self.loose = loose_pointers(batch.tensors["grad"])
        columns = [[t.data_ptr() for t in batch.tensors[name]] for name in layout.columns]
        loose = {i for column in columns for i, p in enumerate(column) if p & 15} | self.loose
        classes = {True: [i for i in range(len(batch)) if i not in loose], False: sorted(loose)}
        scalars = rows * max(layout.scalars, 1)
        self.buffer = torch.zeros((scalars + 2 * len(batch)) * WORD, dtype=torch.uint8, device=self.device)
        self.rows = self.buffer[: scalars * WORD].view(torch.float64)
        self.model = torch.zeros(max(len(layout.reductions), 1), dtype=torch.float64, device=self.device)
        moving = self.buffer[scalars * WORD :].view(torch.int64)
        self.launches: list[Launch] = []
        for aligned, members in classes.items():
            if members:
                part, moving = moving[: 2 * len(members)], moving[2 * len(members) :]
                self.launches.append(self._launch(members, aligned, columns, part))
        self._sender = Sender(self.buffer)
        self._sent: list[int] = []

    def fits(self, batch: Batch, pointers: Sequence[int]) -> bool:
        """Whether the tables still describe ``batch``, whose gradients are now at ``pointers``."""
        return (
            batch is self.batch
            and len(batch.values) <= self.capacity
            and (not reduce(or_, pointers) & 15 if not self.loose else loose_pointers(batch.tensors["grad"]) == self.loose)
        )

    def send(self, pointers: list[int], numbers: Sequence[Sequence[float]]) -> None:
        """Send the step's scalars, one row for each of ``numbers``, and pointers and row numbers if they changed."""
        scalars = array("d", chain.from_iterable(numbers))
        moving = self._moving(pointers)
        parts: list[tuple[int, array[Any]]] = [(0, scalars)]
        if moving != self._sent:
            self._sent = moving
            parts.append((self.rows.numel() * WORD, array("q", moving)))
        self._sender.send(parts)

    def record(self, pointers: list[int], rows: Sequence[Tensor]) -> None:
        """Fill the buffer from the device, and for a captured step from a host buffer that only its replays read."""
        width = self.layout.scalars
        for i, row in enumerate(rows):
            self.rows[i * width : (i + 1) * width] = row
        self._sent = self._moving(pointers)
        self._sender.record(self.rows.numel() * WORD, array("q", self._sent))

    def _moving(self, pointers: list[int]) -> list[int]:
        """Gradient pointers and row numbers, launch by launch."""
        if len(self.launches) == 1:
            return [*pointers, *self.batch.rows]
        parts = ([*(pointers[i] for i in m), *(self.batch.rows[i] for i in m)] for m in (x.members for x in self.launches))
        return list(chain.from_iterable(parts))

    def _launch(self, members: list[int], aligned: bool, columns: list[list[int]], moving: Tensor) -> Launch:
        numels = torch.tensor([self.batch.tensors["param"][i].numel() for i in members], device="cpu")
        of, start, first, counts = tile(numels, self.chunk)
        pointers = torch.tensor([[column[i] for i in members] for column in columns], dtype=torch.int64, device="cpu")
        table = torch.cat([pointers, numels[None], first[None], counts[None]]).T.contiguous()
        partials = torch.zeros(max(len(self.layout.reductions), 1), len(of), dtype=torch.float64, device=self.device)
        chunks = torch.stack([of, start], 1).to(self.device)
        return Launch(members, aligned, table.to(self.device), chunks, moving, partials)


def tile(numels: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut tensors into chunks.

    Args:
        numels: int64 ``[tensors]``.
        chunk: elements of a chunk; the last one of a tensor may be shorter.

    Returns:
        Of each chunk, its tensor and the offset of its first element; of each tensor, its first chunk and their number.
    """
    counts = (numels + chunk - 1) // chunk
    first = counts.cumsum(0) - counts
    of = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    start = (torch.arange(int(counts.sum()), device="cpu") - first[of]) * chunk
    return of, start, first, counts


def loose_pointers(tensors: Sequence[Tensor]) -> set[int]:
    """The places of the tensors that do not start at a multiple of 16 bytes."""
    return {i for i, t in enumerate(tensors) if t.data_ptr() & 15}


class Sender:
    """Copies host numbers into a device buffer without waiting for the device, through a ring of pinned buffers."""

    SLOTS = 8

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self._cuda = target.device.type == "cuda"
        self._ring = [(pinned(target), torch.cuda.Event()) for _ in range(self.SLOTS)] if self._cuda else []  # type: ignore[no-untyped-call]
        self._replay = pinned(target) if self._cuda else target  # made here: a capture allows no allocation
        self._next = 0

    def send(self, parts: Sequence[tuple[int, array[Any]]]) -> None:
        """Copy each array to its byte offset; the parts follow each other."""
        if not self._cuda:
            fill(self._target, parts)
            return
        self._next = (self._next + 1) % self.SLOTS
        buffer, event = self._ring[self._next]
        event.synchronize()  # the copy from this buffer eight steps ago; as a rule it ended long since
        fill(buffer, parts)
        end = parts[-1][0] + len(parts[-1][1]) * WORD
        self._target[:end].copy_(buffer[:end], non_blocking=True)
        event.record()

    def record(self, offset: int, values: array[Any]) -> None:
        """Copy from a buffer that is used for nothing else, so that a replay of the copy finds it as it was."""
        fill(self._replay, [(offset, values)])
        if self._cuda:
            self._target[offset:].copy_(self._replay[offset:], non_blocking=True)


def pinned(like: Tensor) -> Tensor:
    """A pinned host buffer as large as ``like``."""
    return torch.zeros(like.numel(), dtype=torch.uint8, pin_memory=True)


def fill(buffer: Tensor, parts: Sequence[tuple[int, array[Any]]]) -> None:
    """Write arrays into a host buffer at byte offsets."""
    for offset, values in parts:
        address, length = values.buffer_info()
        ctypes.memmove(buffer.data_ptr() + offset, address, length * WORD)
