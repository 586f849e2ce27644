"""How parameters enter a plan: with the state that they have, and what they lack of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hbcore.engine.courses import Course
from hbcore.engine.lanes import Entry, Lane, aligned, initial_state, is_transient
from hbcore.engine.slabs import Seat, Slab, SlabKey
from hbcore.rules.transform import Transform
from hbcore.rules.views import Block
from hbcore.state.steps import Address, StepCounters

if TYPE_CHECKING:
    from hbcore.engine.plan import Surroundings


class Newcomer(NamedTuple):
    """A parameter that the plan does not know, or not as it is now."""

    group: int
    param: Tensor
    course: Course
    lanes: tuple[Lane, ...]


class Adopter:
    """Collects newcomers, then takes them in together: one counter slab, and one slab for all blocks of one kind."""

    def __init__(self, around: Surroundings, counters: StepCounters) -> None:
        self.around, self.counters = around, counters
        self._new: list[Newcomer] = []

    def want(self, group: int, param: Tensor, course: Course, lanes: tuple[Lane, ...]) -> None:
        """Adopt ``param`` with the others."""
        self._new.append(Newcomer(group, param, course, lanes))

    def holds(self, entry: Entry) -> bool:
        """Whether the optimizer's state still holds the very tensors that were planned for."""
        state = self.around.state[entry.param]
        walked = {name for lane in entry.lanes for name in lane.dtypes if not is_transient(name)}
        return state is entry.state and all(
            state.get(name) is tensor and (name not in walked or aligned(tensor, entry.param))
            for name, tensor in entry.stored.items()
        )

    def adopt(self) -> dict[Tensor, Entry]:
        """Make an entry of each newcomer."""
        addresses, seats = self._addresses(), self._seats()
        return {n.param: self._entry(n, addresses[n.param], tuple(seats[n.param])) for n in self._new}

    def _entry(self, n: Newcomer, address: Address, seats: tuple[Seat, ...]) -> Entry:
        p, state = n.param, self.around.state[n.param]
        names = ["step"]
        for lane in n.lanes:
            state.update(initial_state(lane, p, state))
            for name, dtype in lane.dtypes.items():
                if not is_transient(name):
                    names.append(name)
                    if state[name].dtype != dtype or not aligned(state[name], p):
                        state[name] = torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(state[name])
        touched = float(state.get("step", 0.0)) > 0
        for views in (seat.state() for seat in seats):
            for name, view in views.items():
                if name in state:
                    touched = touched or not torch.equal(view, state[name].to(view.device, view.dtype))
                    view.copy_(state[name])
            state.update(views)
            names += views
        state["step"] = self.counters.view(address)
        stored = {name: state[name] for name in names}
        identity = self.around.identity(n.group, p)
        primed = touched or not n.course.primes
        return Entry(p, n.group, n.course, n.lanes, address, state, identity, seats, stored, primed)

    def _addresses(self) -> dict[Tensor, Address]:
        """A counter for each newcomer, which goes on from where its state says."""
        capturable = self.around.settings.capturable
        devices = {n.param: n.param.device if capturable else torch.device("cpu") for n in self._new}
        addresses: dict[Tensor, Address] = {}
        for device in set(devices.values()):
            there = [p for p, d in devices.items() if d == device]
            opened = self.counters.open([float(self.around.state[p].get("step", 0.0)) for p in there], device)
            addresses.update(zip(there, opened, strict=True))
        return addresses

    def _seats(self) -> dict[Tensor, list[Seat]]:
        """Seats in new slabs: late parameters open slabs of their own, so that nobody else's state moves."""
        rows: dict[SlabKey, list[str]] = {}
        places: list[tuple[Newcomer, list[list[tuple[Block, SlabKey, int]]]]] = []
        rules: dict[SlabKey, tuple[Transform, dict[str, torch.dtype]]] = {}
        for n in self._new:
            identity = self.around.identity(n.group, n.param) if n.course.rules else ""
            levels: list[list[tuple[Block, SlabKey, int]]] = []
            for lane, i in zip(n.lanes, n.course.rules, strict=False):
                rule, level = n.course.transforms[i], []
                for k, block in enumerate(rule.blocks(n.param.shape)):
                    key = SlabKey(lane.key.recipe, n.group, i, block.shape, n.param.dtype, n.param.device)
                    rules[key] = (rule, dict(lane.key.recipe.feeds))
                    names = rows.setdefault(key, [])
                    level.append((block, key, len(names)))
                    names += [f"{identity}/{k}.{j}" for j in range(block.batch)]
                levels.append(level)
            places.append((n, levels))
        slabs = {key: Slab(key, *rules[key], names) for key, names in rows.items()}
        return {
            n.param: [Seat(n.param.shape, [(block, slabs[key], row) for block, key, row in level]) for level in levels]
            for n, levels in places
        }
