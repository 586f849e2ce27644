"""Which parameters run together, and one step over them. The engine's cache for one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.eager_backend import DirectExecutable
from hbcore.engine.fallback import candidates, compile_first, fell_back
from hbcore.engine.lanes import Entry, Group, Lane, LaneKey, Work, aligned, by_lane, initial_state
from hbcore.engine.layout import is_dense
from hbcore.engine.options import Settings
from hbcore.engine.recipe import Recipe
from hbcore.engine.report import Report
from hbcore.engine.trace import trace
from hbcore.engine.values import NO_AMP, Amp, capturing, device_values, numbers
from hbcore.errors import CompileError, SparseGradientError, TraceError
from hbcore.rules.transform import Domain
from hbcore.state.slots import StateMap
from hbcore.state.steps import Address, StepCounters


class Plan:
    """Built as parameters first show a gradient; dropped when groups are added or a checkpoint is loaded.

    Args:
        groups: the optimizer's param groups.
        state: the optimizer's state, which this creates slots in.
        recipe: param group -> its recipe.
        name_of: (group index, parameter index) -> what messages call it.
        identity: (group index, parameter) -> what its noise is drawn by: seed, and name or position.
        report: where to say what runs.
        settings: the optimizer's options: which backend, whether lanes are shared, whether steps may be captured.
    """

    def __init__(
        self,
        groups: list[Group],
        state: dict[Tensor, dict[str, Any]],
        recipe: Callable[[Group], Recipe],
        name_of: Callable[[int, int], str],
        identity: Callable[[int, Tensor], str],
        report: Report,
        settings: Settings,
    ) -> None:
        self.groups, self.state, self.recipe, self.report = groups, state, recipe, report
        self.name_of, self.identity = name_of, identity
        self.settings = settings
        self.counters = StepCounters()
        self.entries: dict[Tensor, Entry] = {}
        self.lanes: dict[LaneKey, Lane] = {}
        self.numel = sum(p.numel() for g in groups for p in g["params"])
        self._recipes: dict[int, Recipe] = {}
        self._works: list[Work] | None = None
        self._idle: list[Tensor] = []
        self._model_numel = 0.0
        self._active: list[Tensor] = []
        self._revision: float = 0
        self._lists: list[list[Tensor]] = []
        self._lengths: list[int] = []
        self._selection = self.counters.select([])

    def step(self, amp: Amp = NO_AMP) -> list[Tensor]:
        """Run one step for every parameter that has a gradient; return those parameters."""
        if self._works is None or not self._unchanged():
            if capturing():
                raise CompileError(
                    "the parameters that have a gradient, or where they lie, changed since the last step; "
                    "run a whole step outside the capture first, with the gradients that the captured one will have."
                )
            self._works = self._replan()
        works, start = self._works, 0
        base, ahead = self._selection.coming(trusted=self.settings.capturable)
        for work in works:  # everything compiles before anything is written
            self._fill(work, work.rows(base, start, ahead), amp)
            start += len(work.entries)
            self._compile(work)
        self._run(works)
        self._selection.advance(1 if amp.found_inf is None else (amp.found_inf == 0).float())  # while the device is at work
        for work in works:
            work.batch.tensors["grad"].clear()  # else a gradient that the user dropped would live until the next one
        self.report.backend = "+".join(sorted({w.lane.backend for w in works})) or self.report.backend
        return self._active

    def _unchanged(self) -> bool:
        """Whether last step's layout still holds; reads the gradients on the way."""
        assert self._works is not None
        return (
            all(map(is_, (group["params"] for group in self.groups), self._lists))
            and list(map(len, self._lists)) == self._lengths
            and all(self._recipes[g].fits(group) for g, group in enumerate(self.groups))
            and all(p.grad is None for p in self._idle)
            and self._revision == self._revised()
            and all(w.collect() for w in self._works)
        )

    def _revised(self) -> float:
        """What changes when somebody replaces state; never twice the same where a wrapper put a mapping of its own there."""
        return self.state.revision.count if isinstance(self.state, StateMap) else math.nan

    def _replan(self) -> list[Work]:
        """Find the parameters with a gradient; new ones get their state and a step counter at zero."""
        fresh: list[tuple[int, Tensor, Lane]] = []
        active: list[Tensor] = []
        self._idle = []
        for g, group in enumerate(self.groups):
            if g not in self._recipes or not self._recipes[g].fits(group):
                self._recipes[g] = self.recipe(group)
            for i, p in enumerate(group["params"]):
                if p.numel() == 0:
                    continue
                if p.grad is None:
                    self._idle.append(p)
                    continue
                active.append(p)
                key = self._key(self._recipes[g], p, g, i)
                entry = self.entries.get(p)
                if entry is None or entry.group != g or entry.lane.key != key or not self._current(entry):
                    fresh.append((g, p, self._lane(key, p, group)))
        self._adopt(fresh)
        self._model_numel = float(sum(p.numel() for p in active))
        works = by_lane(self.entries[p] for p in active)
        for work in works:
            work.collect()
        self._active = [p for w in works for p in w.params]
        self._selection = self.counters.select([e.counter for w in works for e in w.entries])
        self._revision = self._revised()
        self._lists = [group["params"] for group in self.groups]
        self._lengths = list(map(len, self._lists))
        return works

    def _key(self, recipe: Recipe, p: Tensor, g: int, i: int) -> LaneKey:
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise SparseGradientError(
                f"{self.name_of(g, i)} has a sparse gradient ({grad.layout}); use an optimizer for sparse gradients, "
                "or make the layer dense (nn.Embedding(..., sparse=False))."
            )
        return LaneKey(recipe, p.device, p.dtype, grad.dtype, is_dense(p), None if self.settings.multi_tensor else id(p))

    def _lane(self, key: LaneKey, p: Tensor, group: Group) -> Lane:
        if key not in self.lanes:
            example = dict(zip(key.recipe.scalar_names, [*numbers(key.recipe, group), *[1.0] * 4], strict=False))
            transforms = key.recipe.transforms(example)
            slots = {name: slot.fill for t in transforms for name, slot in t.slots(p).items()}
            dtypes = key.recipe.dtypes(p, key.grad, list(slots))
            self.lanes[key] = Lane(key, slots, dtypes, transforms)
        return self.lanes[key]

    def _current(self, entry: Entry) -> bool:
        """Whether the optimizer's state still holds the very tensors that were planned for."""
        state = self.state[entry.param]
        return state is entry.state and all(
            state.get(name) is tensor and (name == "step" or aligned(tensor, entry.param))
            for name, tensor in entry.stored.items()
        )

    def _adopt(self, fresh: list[tuple[int, Tensor, Lane]]) -> None:
        """Plan parameters, taking over what state they have and creating what they lack."""
        if not fresh:
            return
        devices = {p: p.device if self.settings.capturable else torch.device("cpu") for _, p, _ in fresh}
        addresses: dict[Tensor, Address] = {}
        for device in set(devices.values()):
            there = [p for p, d in devices.items() if d == device]
            opened = self.counters.open([float(self.state[p].get("step", 0.0)) for p in there], device)
            addresses.update(zip(there, opened, strict=True))
        for g, p, lane in fresh:
            address = addresses[p]
            state = self.state[p]
            state["step"] = self.counters.view(address)
            state.update(initial_state(lane, p, state))
            for name, dtype in lane.dtypes.items():
                if name in state and not (state[name].dtype == dtype and aligned(state[name], p)):
                    state[name] = torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(state[name])
            stored = {name: state[name] for name in ("step", *lane.dtypes) if name in state}
            self.entries[p] = Entry(p, g, lane, address, state, self.identity(g, p), stored)

    def _fill(self, work: Work, rows: list[tuple[int, float]], amp: Amp) -> None:
        """Write down the numbers of each distinct (group, step)."""
        self._trace(work.lane)
        recipe = work.lane.key.recipe
        if self.settings.capturable:
            steps = [work.entries[work.batch.rows.index(i)].stored["step"] + 1 for i in range(len(rows))]
            work.batch.values = [
                device_values(recipe, self.groups[g], step, amp, self._model_numel)
                for (g, _), step in zip(rows, steps, strict=True)
            ]
        else:
            work.batch.values = [[*numbers(recipe, self.groups[g]), count, self._model_numel] for g, count in rows]

    def _trace(self, lane: Lane) -> None:
        if lane.program is None and lane.executable is None:
            try:
                lane.program = trace(lane.key.recipe, lane.dtypes, " -> ".join(t.name for t in lane.transforms))
                self.report.programs += 1
            except TraceError as error:
                if any(t.domain == Domain.MODEL for t in lane.transforms):
                    raise  # one parameter at a time cannot see the model
                fell_back(self.report, f"the chain cannot be fused: {error} It runs one parameter at a time")
                lane.executable, lane.backend = DirectExecutable(lane.key.recipe), "eager"

    def _compile(self, work: Work) -> None:
        """Compile what the lane lacks for this batch, falling back while nothing is written yet."""
        lane = work.lane
        if lane.program is None:
            return
        backends = candidates(self.settings.compile if lane.key.dense else "eager", lane.key.device, self.numel)
        if not lane.key.dense:
            self.report.note("parameters that are not dense in memory run eagerly, one at a time")
        if lane.executable is None:
            lane.backend, lane.executable = compile_first(backends, lane.program, work.batch, self.report)
        try:
            compiles = lane.executable.prepare(work.batch)
        except CompileError as error:  # a size or an alignment that had no gradient before
            if capturing():
                raise
            rest = backends[[b.name for b in backends].index(lane.backend) + 1 :]
            fell_back(self.report, f"{lane.backend} does not run here: {error}. {rest[0].name} runs instead")
            lane.backend, lane.executable = compile_first(rest, lane.program, work.batch, self.report)
            compiles = lane.executable.prepare(work.batch)
        self.report.compiles += max(compiles - lane.compiles, 0)
        lane.compiles = compiles

    def _run(self, works: list[Work]) -> None:
        """Run every lane's phases; a phase that reads a sum over the model waits until all lanes have contributed."""
        waiting = {
            r.name: {id(w) for w in works if w.lane.program and r in _reductions(w.lane)}
            for w in works
            for r in _reductions(w.lane)
            if r.domain == Domain.MODEL
        }
        done, self.report.launches = dict.fromkeys(map(id, works), 0), 0
        while any(done[id(w)] < w.lane.phases for w in works):
            for w in works:
                k = done[id(w)]
                if k == w.lane.phases or (w.lane.program and any(waiting.get(s) for s in w.lane.program.phases[k].sums)):
                    continue
                assert w.lane.executable is not None
                self.report.launches += w.lane.executable.run(k, w.batch)
                done[id(w)] += 1
                for r in w.lane.program.phases[k].reduces if w.lane.program else ():
                    if r.domain == Domain.MODEL:
                        waiting[r.name].discard(id(w))
                        if not waiting[r.name]:
                            _combine(r.name, r.how, works)


def _reductions(lane: Lane) -> list[Any]:
    return [r for p in lane.program.phases for r in p.reduces] if lane.program else []


def _combine(name: str, how: str, works: list[Work]) -> None:
    """Make one number of what every lane contributed, and give it to all of them."""
    parts = [x.double() for w in works for x in w.batch.sums.get(name, ())]
    parts = [x.to(parts[0].device) for x in parts]
    total = torch.stack(parts).sum() if how == "sum" else torch.stack(parts).amax()
    for w in works:
        w.batch.model[name] = total
