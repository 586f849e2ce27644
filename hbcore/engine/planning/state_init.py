"""How parameters enter a plan: with the state that they have, and what they lack of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.distributed.exchange import owners
from hbcore.distributed.placement import gathered, local, shards_of, spread_like
from hbcore.engine.core import OptimizerCore
from hbcore.engine.planning.partition import Course
from hbcore.engine.planning.segments import Entry, Lane, aligned, initial_state, is_transient
from hbcore.engine.stacks.stack import Seat, Slab, SlabKey, SpreadSeat
from hbcore.errors import RuleError, StateWarning
from hbcore.rules.transform import Transform
from hbcore.rules.views import Block
from hbcore.state.expected import expected
from hbcore.state.steps import Address, StepCounters
from hbcore.warn import warn_at_caller


class Newcomer(NamedTuple):
    """A parameter that the plan does not know, or not as it is now."""

    group: int
    param: Tensor
    course: Course
    lanes: tuple[Lane, ...]


class Adopter:
    """Collects newcomers, then takes them in together: one counter slab, and one slab for all blocks of one kind."""

    def __init__(self, core: OptimizerCore, counters: StepCounters) -> None:
        self.core, self.counters = core, counters
        self._new: list[Newcomer] = []

    def want(self, group: int, param: Tensor, course: Course, lanes: tuple[Lane, ...]) -> None:
        """Adopt ``param`` with the others."""
        self._new.append(Newcomer(group, param, course, lanes))

    def holds(self, entry: Entry) -> bool:
        """Whether the optimizer's state still holds the very tensors that were planned for."""
        state = self.core.state[entry.param]
        walked = {name for lane in entry.lanes for name in lane.dtypes if not is_transient(name)}
        part = local(entry.param.detach())
        same = part.data_ptr() == entry.local.data_ptr() and part.stride() == entry.local.stride()
        return (
            same
            and state is entry.state
            and all(
                state.get(name) is tensor and (name not in walked or aligned(entry.stored[name], local(entry.param)))
                for name, tensor in entry.held.items()
            )
        )

    def adopt(self) -> dict[Tensor, Entry]:
        """Make an entry of each newcomer."""
        addresses, seats = self._addresses(), self._seats()
        return {n.param: self._entry(n, addresses[n.param], tuple(seats[n.param])) for n in self._new}

    def _entry(self, n: Newcomer, address: Address, seats: tuple[Seat | SpreadSeat, ...]) -> Entry:
        p, state, part = n.param, self.core.state[n.param], local(n.param.detach())
        names = ["step"]
        for lane in n.lanes:
            state.update({name: spread_like(t, p) for name, t in initial_state(lane, part, state).items()})
            for name, dtype in lane.dtypes.items():
                if not is_transient(name):
                    if not (name.startswith("param#") and name in names):  # every lane reads the parameter, and what it lacks
                        names.append(name)
                    old = local(state[name])
                    if old.dtype != dtype or not aligned(old, part):
                        moved = torch.empty_like(part, dtype=dtype, requires_grad=False).copy_(old)
                        state[name] = spread_like(moved, p)
        touched = float(state.get("step", 0.0)) > 0
        for seat in seats:
            touched = self._take_over(n, seat, state) or touched
            names += seat.state()
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RuleError(f"two rules of one chain claim the slot {twice[0]!r} of a parameter; rename one of them.")
        state["step"] = self.counters.view(address)
        held = {name: state[name] for name in names}
        return Entry(
            param=p,
            local=part,
            shards=shards_of(p),
            group=n.group,
            course=n.course,
            lanes=n.lanes,
            counter=address,
            state=state,
            identity=self.core.seed_key(n.group, p),
            seats=seats,
            held=held,
            stored={name: local(t) for name, t in held.items()},
            primed=touched or not n.course.primes,
        )

    def _take_over(self, n: Newcomer, seat: Seat | SpreadSeat, state: dict[str, Any]) -> bool:
        """Move what the state has of a matrix rule's slots into the slabs; say whether it was more than what it begins with.

        Collective for a spread parameter whose state is spread as well, as a checkpoint brings it: all of it goes to the owner.
        """
        views = seat.state()
        rules = [n.course.transforms[i] for i in n.course.rules]
        slots = {part: slot for slot in expected(rules, n.param, n.lanes[0].key.recipe.codec) for part in slot.parts(n.param)}
        touched = False
        for name in [name for name in slots if name in state and (name in views or isinstance(seat, SpreadSeat))]:
            whole = gathered(state[name])
            blank = slots[name].blank(whole)[name]
            if whole.shape != blank.shape:
                warn_at_caller(
                    f"state {name!r} of shape {tuple(whole.shape)} starts afresh with {tuple(blank.shape)}, as now asked for.",
                    StateWarning,
                )
            else:
                touched = touched or not torch.equal(blank, whole.to(blank.dtype))
                if name in views:
                    views[name].copy_(whole)
            if name not in views:
                del state[name]
        state.update(views)
        return touched

    def _addresses(self) -> dict[Tensor, Address]:
        """A counter for each newcomer, which goes on from where its state says."""
        capturable = self.core.settings.capturable
        devices = {n.param: n.param.device if capturable else torch.device("cpu") for n in self._new}
        addresses: dict[Tensor, Address] = {}
        for device in set(devices.values()):
            there = [p for p, d in devices.items() if d == device]
            opened = self.counters.open([float(self.core.state[p].get("step", 0.0)) for p in there], device)
            addresses.update(zip(there, opened, strict=True))
        return addresses

    def _seats(self) -> dict[Tensor, list[Seat | SpreadSeat]]:
        """Seats in new slabs: late parameters open slabs of their own, so that nobody else's state moves."""
        rows: dict[SlabKey, list[str]] = {}
        rules: dict[SlabKey, tuple[Transform, dict[str, torch.dtype]]] = {}
        plans: list[tuple[Newcomer, list[list[tuple[Block, SlabKey, int]]]]] = []
        dealt = owners(p for group in self.core.groups for p in group["params"])
        for n in self._new:
            shards = shards_of(n.param)
            levels: list[list[tuple[Block, SlabKey, int]]] = []
            for lane, i in zip(n.lanes, n.course.rules, strict=False):
                rule, level = n.course.transforms[i], []
                elsewhere = shards is not None and dealt[n.param] != shards.rank
                for k, block in enumerate(() if elsewhere else rule.blocks(n.param.shape)):
                    key = SlabKey(lane.key.recipe, n.group, i, block.shape, n.param.dtype, lane.key.device)
                    rules[key] = (rule, dict(lane.key.recipe.feeds))
                    names = rows.setdefault(key, [])
                    level.append((block, key, len(names)))
                    identity = self.core.seed_key(n.group, n.param)
                    names += [f"{identity}/{k}.{j}" for j in range(block.batch)]
                levels.append(level)
            plans.append((n, levels))
        slabs = {key: Slab(key, *rules[key], names) for key, names in rows.items()}
        seats: dict[Tensor, list[Seat | SpreadSeat]] = {}
        for n, levels in plans:
            whole = [Seat(n.param.shape, [(block, slabs[key], row) for block, key, row in level]) for level in levels]
            shards, part = shards_of(n.param), local(n.param.detach())
            seats[n.param] = (
                [*whole]
                if shards is None
                else [
                    SpreadSeat(shards, dealt[n.param], seat, part, dict(lane.key.recipe.feeds))
                    for seat, lane in zip(whole, n.lanes, strict=False)
                ]
            )
        return seats
