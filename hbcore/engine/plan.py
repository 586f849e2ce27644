"""Which parameters run together, and one step over them. The engine's cache for one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.eager_backend import DirectExecutable
from hbcore.engine.fallback import candidates, compile_first, fell_back
from hbcore.engine.lanes import Entry, Group, Lane, LaneKey, Work, by_lane, initial_state, numbers
from hbcore.engine.layout import is_dense
from hbcore.engine.recipe import Recipe, compute_dtype
from hbcore.engine.report import Report
from hbcore.engine.trace import trace
from hbcore.errors import ParameterError, TraceError
from hbcore.rules.transform import Domain
from hbcore.state.steps import StepCounters


class Plan:
    """Built as parameters first show a gradient; dropped when groups are added or a checkpoint is loaded.

    Args:
        groups: the optimizer's param groups.
        state: the optimizer's state, which this creates slots in.
        recipe: param group -> its recipe.
        name_of: (group index, parameter index) -> what messages call it.
        report: where to say what runs.
        choice: the ``compile`` option.
        multi_tensor: whether parameters share lanes at all.
    """

    def __init__(
        self,
        groups: list[Group],
        state: dict[Tensor, dict[str, Any]],
        recipe: Callable[[Group], Recipe],
        name_of: Callable[[int, int], str],
        report: Report,
        choice: str,
        multi_tensor: bool,
    ) -> None:
        self.groups, self.state, self.recipe, self.name_of, self.report = groups, state, recipe, name_of, report
        self.choice, self.multi_tensor = choice, multi_tensor
        self.counters = StepCounters()
        self.entries: dict[Tensor, Entry] = {}
        self.lanes: dict[LaneKey, Lane] = {}
        self.numel = sum(p.numel() for g in groups for p in g["params"])
        self._recipes: dict[int, Recipe] = {}
        self._works: list[Work] | None = None
        self._idle: list[Tensor] = []
        self._model_numel = 0.0

    def step(self) -> list[Tensor]:
        """Run one step for every parameter that has a gradient; return those parameters."""
        if self._works is None or not self._unchanged():
            self._works = self._replan()
        works = self._works
        counts = iter(self.counters.advance([c for w in works for c in w.counters]))
        for work in works:
            self._fill(work, [next(counts) for _ in work.entries])
        for work in works:  # everything compiles before anything is written
            self._compile(work)
        self._run(works)
        self.report.backend = "+".join(sorted({w.lane.backend for w in works})) or self.report.backend
        return [p for w in works for p in w.params]

    def _unchanged(self) -> bool:
        """Whether last step's layout still holds; reads the gradients on the way."""
        assert self._works is not None
        return (
            all(self._recipes[g].fits(group) for g, group in enumerate(self.groups))
            and all(p.grad is None for p in self._idle)
            and all(self.state.get(e.param) is e.state for w in self._works for e in w.entries)
            and all(w.collect() for w in self._works)
        )

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
                if entry is None or entry.lane.key != key or not self._current(entry):
                    fresh.append((g, p, self._lane(key, p, group)))
        self._adopt(fresh)
        self._model_numel = float(sum(p.numel() for p in active))
        works = by_lane(self.entries[p] for p in active)
        for work in works:
            work.collect()
        return works

    def _key(self, recipe: Recipe, p: Tensor, g: int, i: int) -> LaneKey:
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise ParameterError(
                f"{self.name_of(g, i)} has a sparse gradient ({grad.layout}); use an optimizer for sparse gradients, "
                "or make the layer dense (nn.Embedding(..., sparse=False))."
            )
        return LaneKey(recipe, p.device, p.dtype, grad.dtype, is_dense(p), None if self.multi_tensor else id(p))

    def _lane(self, key: LaneKey, p: Tensor, group: Group) -> Lane:
        if key not in self.lanes:
            example = dict(zip(key.recipe.scalar_names, [*numbers(key.recipe, group), 1.0, 1.0], strict=True))
            slots: dict[str, float] = {}
            dtypes = {"param": p.dtype, "grad": key.grad}
            transforms = key.recipe.transforms(example)
            for t in transforms:
                for name, slot in t.slots(p).items():
                    slots[name] = slot.fill
                    dtypes.update(key.recipe.codec.parts(name, compute_dtype(p.dtype)))
            self.lanes[key] = Lane(key, slots, dtypes, " -> ".join(t.name for t in transforms))
        return self.lanes[key]

    def _current(self, entry: Entry) -> bool:
        """Whether the optimizer's state still holds the very tensors that were planned for."""
        state = self.state[entry.param]
        return state is entry.state and all(state.get(name) is tensor for name, tensor in entry.stored.items())

    def _adopt(self, fresh: list[tuple[int, Tensor, Lane]]) -> None:
        """Plan parameters, taking over what state they have and creating what they lack."""
        if not fresh:
            return
        addresses = self.counters.open([float(self.state[p].get("step", 0.0)) for _, p, _ in fresh])
        for (g, p, lane), address in zip(fresh, addresses, strict=True):
            state = self.state[p]
            state["step"] = self.counters.view(address)
            state.update(initial_state(lane, p, state))
            stored = {name: state[name] for name in ("step", *lane.dtypes) if name in state}
            self.entries[p] = Entry(p, g, lane, address, state, stored)

    def _fill(self, work: Work, counts: list[float]) -> None:
        """Compute the hoisted scalars for each distinct (group, step)."""
        self._trace(work.lane)
        recipe, program = work.lane.key.recipe, work.lane.program
        scalars = []
        for g, count in work.rows(counts):
            values = [*numbers(recipe, self.groups[g]), count, self._model_numel]
            row = torch.tensor(values, dtype=torch.float64).unbind()
            scalars.append(program.scalars(row) if program else row)
        work.batch.scalars = scalars

    def _trace(self, lane: Lane) -> None:
        if lane.program is None and lane.executable is None:
            try:
                lane.program = trace(lane.key.recipe, lane.dtypes, lane.label)
                self.report.programs += 1
            except TraceError as error:
                fell_back(self.report, f"the chain cannot be fused: {error} It runs one parameter at a time")
                lane.executable, lane.backend = DirectExecutable(lane.key.recipe), "eager"

    def _compile(self, work: Work) -> None:
        lane = work.lane
        if lane.executable is None:
            assert lane.program is not None
            choice = self.choice if lane.key.dense else "eager"
            if not lane.key.dense:
                self.report.note("parameters that are not dense in memory run eagerly, one at a time")
            backends = candidates(choice, lane.key.device, self.numel)
            lane.backend, lane.executable = compile_first(backends, lane.program, work.batch, self.report)

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
