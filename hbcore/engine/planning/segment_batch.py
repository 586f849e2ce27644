"""What of a segment's parameters takes part in a step, and where it lies."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor

from hbcore.distributed.placement import local
from hbcore.engine.addresses import Addresses
from hbcore.engine.backends.base import Batch
from hbcore.engine.graph.program import NOISE, keyed
from hbcore.engine.offload import Needs, Twin
from hbcore.engine.planning.segments import Member, Segment
from hbcore.rules.noise import noise_key, stream_key

_grad = attrgetter("grad")


class SegmentBatch(Batch):
    """The members of one segment that have a gradient, with their columns laid out; used until something moves.

    Args:
        segment: what runs.
        members: its active members.
        positions: the index of each one's step count among those of all active members.

    Attributes:
        everyone: its active members, also those of which this rank has no part.
        every_row: the row of scalars of each of them.
        carried: carried number that depends on a reduction -> its new values, an element for each of them.
        reported: what the step says of them, likewise.
    """

    def __init__(self, segment: Segment, members: list[Member], positions: list[int]) -> None:
        self.segment, self.everyone, self.positions = segment, members, positions
        self.shards = members[0].shards
        self.here = [i for i, m in enumerate(members) if m.local.numel()]  # a rank may have no rows of a parameter
        self.members = [members[i] for i in self.here]
        self._params = [m.param for m in self.members]
        self._locals = [m.local for m in self.members]
        self._addresses = Addresses(self._locals)
        self._strides = list(map(Tensor.stride, self._locals))
        noise = [name for name in segment.dtypes if name.startswith(NOISE)]
        self._streams = {name: [stream_key(m.seed_key, name) for m in self.members] for name in keyed(noise, segment.noise)}
        columns: dict[str, list[Tensor]] = {"param": [], "grad": []}
        for name in segment.dtypes:
            if name != "grad" and name not in noise:
                column = [m.column(segment, name) for m in self.members]
                columns[name] = column if name in segment.key.spec.numbers else list(map(at_least_1d, column))
        super().__init__(columns, [], [], dense=segment.key.dense, bits=segment.noise)
        if self.shards is not None:
            self.numels = [float(m.numel) for m in self.members]
            self.starts = [sum(shards_before(m)) for m in self.members]
        self._pieces = [m.elements for m in self.members if m.elements is not None]
        if self._pieces:
            self.numels, self.starts = [float(m.numel) for m in self.members], [e.start for e in self._pieces]
        self._scalars = () in self._strides
        self._viewed = self.shards is not None or any(p.is_complex() for p in self._params)
        self._contiguous = all(map(Tensor.is_contiguous, self._locals))
        self.every_row: list[int] = []
        self.carried: dict[str, Tensor] = {}
        self.reported: dict[str, Tensor] = {}
        self._base: list[float] | None = None
        self._pairs: list[tuple[int, float]] = []
        self._opened: list[int] = []
        # torch checks an assigned gradient's dtype itself, unless a parameter allows any (torch 2.10's grad_dtype=None)
        self._any_dtype = any(getattr(p, "grad_dtype", p.dtype) is None for p in self._params)

    def collect(self) -> bool:
        """Read this step's gradients; False if anything moved, so that the plan must be laid out again."""
        grads, now = list(map(_grad, self._params)), self._params
        try:
            if self._viewed:
                grads, now = list(map(local, grads)), [local(p.detach()) for p in self._params]
            if self._pieces:
                grads, now = cut(grads, self._pieces), cut([p.detach() for p in now], self._pieces)
            if self._contiguous:  # the usual case, and a third of the time
                alike = all(map(Tensor.is_contiguous, grads))
            else:
                alike = list(map(Tensor.stride, grads)) == self._strides
            stayed = self._addresses.unchanged(now)
        except (AttributeError, RuntimeError, TypeError):  # a sparse gradient has no layout, a missing one nothing at all
            return False
        if not stayed or (self._any_dtype and not all(g.dtype == self.segment.key.grad for g in grads)):
            return False
        if not alike or self._scalars:
            grads = [like(g, p) for g, p in zip(grads, self._locals, strict=True)]
        self.tensors["grad"][:] = grads
        return True

    def needs(self, phase: int) -> Needs:
        """The offloaded state that a phase uses."""
        program, everything = self.segment.program, self._twins(self.segment.dtypes)
        if program is None:
            return Needs(everything, everything, self._follow)
        p = program.phases[phase]
        return Needs(self._twins(p.tensors), self._twins(p.writes), self._follow)

    def _twins(self, names: Iterable[str]) -> list[Twin]:
        return [m.twins[name] for name in dict.fromkeys(names) for m in self.members if name in m.twins]

    def _follow(self) -> None:
        """The twins of a phase have memory: have its addresses read again if they are others."""
        addresses = [t.tensor.data_ptr() for m in self.members for t in m.twins.values()]
        if addresses != self._opened:
            self._opened = addresses
            self.moves += 1

    def lend(self) -> None:
        super().lend()
        if self.segment.executable is not None:
            self.segment.executable.forget()

    def drop(self) -> None:
        """Let go of every tensor: executables may hold the batch until they get another one."""
        self.lend()
        for column in self.tensors.values():
            column.clear()
        self.everyone, self.members, self._params, self._locals = [], [], [], []
        self._addresses = Addresses([])

    def release(self) -> None:
        """Let go of this step's gradients, one of which would live on though the user drops it, and of its random words."""
        self.tensors["grad"].clear()
        self._word = None

    def assign_rows(self, base: list[float], ahead: int) -> list[tuple[int, float]]:
        """Give each parameter its row of scalars; return the (group, step) of each row.

        Args:
            base: the step counts of all active members, the same list while they advance together.
            ahead: what to add to them.
        """
        for made in (self.sums, self.model, self.whole, self.carried, self.reported):
            made.clear()
        if self._base is not base:
            index: dict[tuple[int, float], int] = {}
            pairs = ((m.group, base[i]) for m, i in zip(self.everyone, self.positions, strict=True))
            self.every_row = [index.setdefault(pair, len(index)) for pair in pairs]
            self.rows = [self.every_row[i] for i in self.here]
            self._base, self._pairs = base, list(index)
        steps = [int(base[self.positions[i]]) + ahead for i in self.here] if self._streams else []
        for name, streams in self._streams.items():
            self.keys[name] = list(map(noise_key, streams, steps))
        return [(group, count + ahead) for group, count in self._pairs]


def batches_of(members: Iterable[Member]) -> list[SegmentBatch]:
    """One :class:`SegmentBatch` for each segment, in order of appearance; ``members`` are all active ones."""
    segments: dict[Segment, list[tuple[Member, int]]] = {}
    for i, whole in enumerate(members):
        for m in whole.pieces or (whole,):
            for segment in m.segments[: m.reach]:
                segments.setdefault(segment, []).append((m, i))
    return [SegmentBatch(segment, [m for m, _ in some], [i for _, i in some]) for segment, some in segments.items()]


def cut(tensors: Iterable[Tensor], pieces: Iterable[slice]) -> list[Tensor]:
    """A piece of each tensor, in logical order; a view of one that is contiguous."""
    return [t.reshape(-1)[elements] for t, elements in zip(tensors, pieces, strict=True)]


def shards_before(member: Member) -> list[int]:
    """The elements of a sharded parameter that the ranks before this one have."""
    return member.shards.sizes()[: member.shards.rank] if member.shards else []


def like(grad: Tensor, param: Tensor) -> Tensor:
    """``grad`` in the memory order of ``param``: itself, or a copy where they differ."""
    if grad.stride() == param.stride() or param.numel() == 1:
        return at_least_1d(grad.detach())
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def at_least_1d(tensor: Tensor) -> Tensor:
    """A 0-d tensor as a view of one element: beside another 0-d tensor, a scalar would change its dtype."""
    return tensor.view(1) if tensor.ndim == 0 else tensor
