"""Which parameters make one vector for a flat rule, and who rejoins whom; see :mod:`hbcore.rules.flat`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.distributed.placement import local, shards_of, share_out
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.engine.offload import applies
from hbcore.engine.planning.partition import Partition
from hbcore.engine.planning.segments import Member, Segment
from hbcore.engine.stacks.bound_rule import BoundRule
from hbcore.engine.stacks.flat_stack import FlatStack, FlatView, Range
from hbcore.engine.stacks.key import StackKey
from hbcore.errors import ParameterError
from hbcore.rules.flat import serial_name
from hbcore.rules.transform import Transform


class NewMember(NamedTuple):
    """A parameter that the plan does not know, or not as it is now; ``pieces`` are segments for so many pieces of it."""

    group: int
    param: Tensor
    partition: Partition
    segments: tuple[Segment, ...]
    pieces: tuple[Segment, ...] = ()


class FlatKey(NamedTuple):
    """What parameters must share to lie in one vector.

    Attributes:
        rule: its place in the chain.
        alone: with ``multi_tensor=False``, the parameter's ``id``.
        shards: mesh and placements.
    """

    group: int
    spec: SegmentSpec
    rule: int
    serial: int
    dtype: torch.dtype
    device: torch.device
    alone: int | None
    shards: Any


class FlatInit:
    """The vectors of the new members; each rule's view of each of them."""

    def __init__(self, core: OptimizerCore) -> None:
        self.core = core
        self._reads: dict[tuple[int, int], tuple[int, ...]] = {}

    def views(self, new: Iterable[NewMember]) -> dict[tuple[Tensor, int], FlatView]:
        """By the parameter, and how many matrix rules come before the flat one."""
        rows: dict[FlatKey, list[tuple[NewMember, int]]] = {}
        latest: dict[tuple[int, int], int] = {}
        for n in new:
            for level, i in enumerate(n.partition.rules):
                rule = n.partition.transforms[i]
                if rule.flat:
                    if (n.group, i) not in latest:
                        latest[n.group, i] = max(self._serials(n.group, rule))
                    serial = serial_of(self.core.state.get(n.param, {}), rule) or latest[n.group, i] + 1
                    rows.setdefault(self._key(n, level, i, serial), []).append((n, level))
        made: dict[tuple[Tensor, int], FlatView] = {}
        for key, members in rows.items():
            places = {p: i for i, p in enumerate(self.core.groups[key.group]["params"])}
            members.sort(key=lambda member: places[member[0].param])
            stack = self._stack(key, *members[0], [n for n, _ in members])
            for row, (n, level) in enumerate(members):
                made[n.param, level] = FlatView(stack, row, n.param, local(n.param.detach()))
        return made

    def _serials(self, g: int, rule: Transform) -> Iterator[int]:
        """The vectors that the group's parameters belong to by now."""
        yield 0
        for p in self.core.groups[g]["params"]:
            yield serial_of(self.core.state.get(p, {}), rule)

    def _key(self, n: NewMember, level: int, i: int, serial: int) -> FlatKey:
        segment = n.segments[level]
        alone = None if self.core.settings.multi_tensor else id(n.param)
        spec, device = segment.key.spec, segment.key.device
        return FlatKey(n.group, spec, i, serial, n.param.dtype, device, alone, segment.key.shards)

    def _stack(self, key: FlatKey, n: NewMember, level: int, members: list[NewMember]) -> FlatStack:
        rule, spec, feeds = n.partition.transforms[key.rule], key.spec, dict(n.segments[level].key.spec.feeds)
        if (id(spec), key.rule) not in self._reads:
            self._reads[id(spec), key.rule] = BoundRule(spec, key.rule).reads
        ranges = [self._range(m) for m in members]
        length = sum(r.part for r in ranges)
        away = applies(self.core.settings.offload, key.device)
        own = StackKey(spec, key.rule, (), 0.0, (length,), key.dtype, key.device, away)
        reads = self._reads[id(spec), key.rule]
        return FlatStack(own, rule, feeds, ranges, reads, n.param, shards_of(n.param), key.serial)

    def _range(self, n: NewMember) -> Range:
        shards, part = shards_of(n.param), local(n.param.detach())
        start = sum(shards.sizes()[: shards.rank]) if shards else 0
        return Range(f"{self.core.seed_key(n.group, n.param)}/0.0", part.numel(), start, n.param.numel())


def serial_of(state: Mapping[str, Any], rule: Transform) -> int:
    """Which vector a parameter's state says that it belongs to; 0 for none."""
    value = state.get(serial_name(rule))
    return 0 if value is None else int(local(value))


def is_flat(partition: Partition) -> bool:
    """Whether a flat rule is among a parameter's rules."""
    return any(partition.transforms[i].flat for i in partition.rules)


def belongs(state: Mapping[str, Any], partition: Partition) -> bool:
    """Whether a parameter's state says that it is a part of a vector, which cannot be made without it."""
    return any(serial_of(state, partition.transforms[i]) for i in partition.rules if partition.transforms[i].flat)


def companions(members: Iterable[Member], groups: set[int], known: set[Tensor]) -> Iterator[NewMember]:
    """Members of these groups, but for ``known`` ones, that have to be planned again because a part of their vector is."""
    for m in members:
        if m.group in groups and m.param not in known and is_flat(m.partition):
            yield NewMember(m.group, m.param, m.partition, m.segments)


def move_in(view: FlatView, state: dict[str, Any], who: Callable[[], str]) -> None:
    """Move what the state has of a flat rule's slots into the vector.

    Raises:
        ParameterError: a tensor has another shape, as from another rank of approximation.
    """
    shared = view.shared()
    for name, mine in view.parts().items():
        if name not in state or name == view.stack.serial:
            continue
        value = state[name]
        shards = shards_of(view.param) if name not in shared else None
        if shards is not None and not hasattr(value, "device_mesh"):
            value = share_out(value, shards)
        part = local(value)
        if part.shape != mine.shape:
            raise ParameterError(
                f"{who()} has state {name!r} of shape {tuple(part.shape)}, not {tuple(mine.shape)} as the present options ask "
                "for; delete it (del optimizer.state[p]) to start afresh."
            )
        mine.copy_(part)
    state.update(view.state())
