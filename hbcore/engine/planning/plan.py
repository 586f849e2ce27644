"""Which parameters run together, and one step over them. The engine's cache for one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from operator import is_

import torch
from torch import Tensor

from hbcore.distributed.placement import local, shards_of
from hbcore.engine.backends.base import Backend
from hbcore.engine.backends.eager import DirectExecutable
from hbcore.engine.backends.memory_order import is_dense
from hbcore.engine.backends.select import candidates, compile_first, fell_back
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.scalar_inputs import NO_AMP, Amp, capturing, device_values, numbers
from hbcore.engine.graph.segment_spec import Recipe
from hbcore.engine.graph.trace import trace
from hbcore.engine.group_scalars import GroupScalars, advanced, carried
from hbcore.engine.planning import operations as schedule
from hbcore.engine.planning.partition import Course, course, example
from hbcore.engine.planning.segments import Entry, Group, Lane, LaneKey, Work, by_lane
from hbcore.engine.planning.state_init import Adopter
from hbcore.engine.stacks.level import Level, levels_of
from hbcore.errors import CompileError, SparseGradientError, TraceError
from hbcore.rules import route
from hbcore.rules.transform import Domain, Transform
from hbcore.state.steps import StepCounters


class Plan:
    """Built as parameters first show a gradient; dropped when groups are added or a checkpoint does not fit in place."""

    def __init__(self, core: OptimizerCore) -> None:
        self.core = core
        self.groups, self.state, self.report, self.settings = core.groups, core.state, core.report, core.settings
        self.entries: dict[Tensor, Entry] = {}
        self.lanes: dict[LaneKey, Lane] = {}
        self.counters = StepCounters()
        self.numel = sum(p.numel() for g in self.groups for p in g["params"])
        self._courses: dict[tuple[int, tuple[bool, ...], torch.dtype], Course] = {}
        self._recipes: dict[int, Recipe] = {}
        self._forks: dict[int, tuple[Transform, ...]] = {}
        self._works: list[Work] | None = None
        self._levels: list[Level] = []
        self._idle: list[Tensor] = []
        self._model_numel = 0.0
        self._active: list[Entry] = []
        self._params: list[Tensor] = []
        self._transforms: dict[int, list[Transform]] = {}
        self._revision: float = 0
        self._everyone: list[Tensor] = []
        self._empty: list[Tensor] = []
        self._lengths: list[int] = []
        self._selection = self.counters.select([])

    def step(self, amp: Amp = NO_AMP) -> list[Tensor]:
        """Run one step for every parameter that has a gradient; return those parameters."""
        try:
            if any([level.open() for level in self._levels]):
                for work in self._works or ():
                    work.batch.moves += 1
            return self._whole_step(amp)
        finally:
            for level in self._levels:
                level.close()

    def _whole_step(self, amp: Amp) -> list[Tensor]:
        if self._works is None or not self._unchanged():
            if capturing():
                raise CompileError(
                    "the parameters that have a gradient, or where they lie, changed since the last step; "
                    "run a whole step outside the capture first, with the gradients that the captured one will have."
                )
            self._works = self._replan()
        works = self._works
        try:
            self._step(works, amp)
        finally:
            for work in works:
                work.batch.tensors["grad"].clear()  # else a gradient that the user dropped would live until the next one
        self._after_priming()
        # kernels write where autograd does not see it: a graph that saved a parameter must know that it changed
        torch.autograd.graph.increment_version(self._params)
        self.report.backend = "+".join(sorted({w.lane.backend for w in works})) or self.report.backend
        return self._params

    def _step(self, works: list[Work], amp: Amp) -> None:
        """One step over what is laid out."""
        base, ahead = self._selection.coming(trusted=self.settings.capturable)
        progress, refreshes = self._progress()
        for work in works:  # everything compiles before anything is written
            self._fill(work, work.rows(base, ahead), amp, progress)
            self._compile(work)
        for level in self._levels:
            level.arrange(base)
        run_level = self._runner(ahead, progress, refreshes)
        self.report.launches = schedule.run(works, len(self._levels), run_level)
        self._selection.advance(1 if amp.found_inf is None else (amp.found_inf == 0).float())  # while the device is at work
        for g, carries in progress.items():
            self.core.scalars_of(g).update(carries)

    def reread(self) -> None:
        """Somebody wrote to the state tensors in place: what is known of the counters is not true any more."""
        self._selection.forget()

    def _progress(self) -> tuple[dict[int, GroupScalars], dict[int, dict[str, bool]]]:
        """What each active group will carry, as far as its count decides, and which of its rules refresh."""
        progress, refreshes = {}, {}
        for g, transforms in self._transforms.items():
            progress[g], refreshes[g] = advanced(self.core.scalars_of(g), transforms)
        return progress, refreshes

    def _unchanged(self) -> bool:
        """Whether last step's layout still holds; reads the gradients on the way."""
        assert self._works is not None
        return (
            [len(group["params"]) for group in self.groups] == self._lengths
            and all(map(is_, chain.from_iterable(group["params"] for group in self.groups), self._everyone))
            and not any(map(Tensor.numel, self._empty))
            and all(self._recipes[g].fits(group) for g, group in enumerate(self.groups))
            and all(p.grad is None for p in self._idle)
            and self._revision == self._revised()
            and all(w.collect() for w in self._works)
        )

    def _revised(self) -> float:
        """What changes when somebody replaces state."""
        return self.state.revision.count

    def _replan(self) -> list[Work]:
        """Find the parameters with a gradient; new ones get their state and a step counter at zero."""
        self._works = None  # should this fail, the next step begins anew
        adopter = Adopter(self.core, self.counters)
        active: list[Tensor] = []
        self._idle, self._empty = [], []
        self._everyone = [p for group in self.groups for p in group["params"]]
        self._lengths = [len(group["params"]) for group in self.groups]
        known = set(self._everyone)
        self.entries = {p: e for p, e in self.entries.items() if p in known}
        for g, group in enumerate(self.groups):
            if g not in self._recipes or not self._recipes[g].fits(group):
                self._recipes[g], self._forks[g] = self.core.chain.recipe(group), self.core.chain.forked(group)
                self._courses = {key: c for key, c in self._courses.items() if key[0] != g}
            for i, p in enumerate(group["params"]):
                if p.numel() == 0:
                    self._empty.append(p)
                    continue
                if p.grad is None:
                    self._idle.append(p)
                    continue
                active.append(p)
                way = self._course(g, group, p)
                lanes = tuple(self._lane(way, level, p, g, i) for level in range(len(way.lanes)))
                entry = self.entries.get(p)
                if entry is None or entry.group != g or entry.lanes != lanes or not adopter.holds(entry):
                    adopter.want(g, p, way, lanes)
        self.entries.update(adopter.adopt())
        self._active = [self.entries[p] for p in active]
        return self._lay_out()

    def _lay_out(self) -> list[Work]:
        """Sort the active parameters into lanes and slabs."""
        self._model_numel = float(sum(e.numel for e in self._active))
        self._levels = levels_of(self._active, self._levels)
        works = by_lane(self._active)
        collected = [work.collect() for work in works]
        assert all(collected), "a parameter's memory changed while it was planned"
        self._params = [e.param for e in self._active]
        self._transforms = {}
        for way, g in {id(e.course): (e.course, e.group) for e in self._active}.values():
            stepped = [t for t in way.transforms if t.domain == Domain.MATRIX or t.scalars()]
            self._transforms.setdefault(g, []).extend(stepped)
        counted = [e.counter for e in self._active]
        self._selection = self.counters.select(counted, [e.primed for e in self._active])
        self._revision = self._revised()
        return works

    def _after_priming(self) -> None:
        """Parameters that were primed in this step take whole ones from now on."""
        if self._selection.partial:
            for e in self._active:
                e.primed = True
            self._works = None

    def _course(self, g: int, group: Group, p: Tensor) -> Course:
        branches = route.branches(self._forks[g], p)
        key = (g, branches, p.dtype)
        if key not in self._courses:
            self._courses[key] = course(replace(self._recipes[g], branches=branches), group, p, self.settings.promote)
        return self._courses[key]

    def _gradient(self, p: Tensor, g: int, i: int) -> Tensor:
        """A parameter's gradient, looked at, or a dense tensor of its dtype."""
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise SparseGradientError(
                f"{self.core.name_of(g, i)} has a sparse gradient ({grad.layout}); use an optimizer for sparse gradients "
                "(SparseAdam), or make the layer dense (nn.Embedding(..., sparse=False))."
            )
        return grad

    def _lane(self, way: Course, level: int, p: Tensor, g: int, i: int) -> Lane:
        grad = self._gradient(p, g, i)
        part, shards = local(p.detach()), shards_of(p)
        dense = is_dense(part) if not way.rules else part.is_contiguous()  # a slab's rows lie in logical order
        alone = None if self.settings.multi_tensor else id(p)
        mesh = None if shards is None else (shards.mesh, shards.placements)
        recipe, received = way.lanes[level], local(grad).dtype
        key = LaneKey(recipe, part.device, part.dtype, received, dense or not part.numel(), alone, mesh)
        if key not in self.lanes:
            transforms = recipe.transforms(example(recipe, self.groups[g]))
            slots = {name: slot for t in transforms for name, slot in t.slots(p).items()}
            self.lanes[key] = Lane(key, level, slots, recipe.dtypes(part, received, slots), transforms)
        return self.lanes[key]

    def _fill(self, work: Work, rows: list[tuple[int, float]], amp: Amp, progress: dict[int, GroupScalars]) -> None:
        """Write down the numbers of each distinct (group, step), and what the group will carry."""
        self._trace(work.lane)
        recipe = work.lane.key.recipe
        if self.settings.capturable:
            steps = [work.entries[work.batch.rows.index(i)].stored["step"] + 1 for i in range(len(rows))]
            work.batch.values = [
                device_values(recipe, self.groups[g], step, amp, self._model_numel)
                for (g, _), step in zip(rows, steps, strict=True)
            ]
            return
        carries = {g: carried(self.core.scalars_of(g), self._transforms[g]) if recipe.carried else {} for g, _ in rows}
        work.batch.values = [[*numbers(recipe, self.groups[g], carries[g]), count, self._model_numel] for g, count in rows]
        if work.lane.program is not None and work.lane.program.carries:
            for (g, _), values in zip(rows, work.batch.values, strict=True):
                progress[g].update(work.lane.program.carried(values))

    def _trace(self, lane: Lane) -> None:
        if lane.program is None and lane.executable is None:
            try:
                lane.program = trace(lane.key.recipe, lane.dtypes, " -> ".join(t.name for t in lane.transforms))
                self.report.programs += 1
            except TraceError as error:
                spread = lane.key.shards is not None and any(t.domain == Domain.TENSOR for t in lane.transforms)
                if spread or any(t.domain == Domain.MODEL or t.scalars() for t in lane.transforms):
                    raise  # one part at a time sees neither the tensor nor the model, nor carries what all of them share
                fell_back(self.report, f"the chain cannot be fused: {error} It runs one parameter at a time")
                lane.executable, lane.backend = DirectExecutable(lane.key.recipe), "eager"

    def _compile(self, work: Work) -> None:
        """Compile what the lane lacks for this batch, falling back while nothing is written yet."""
        lane = work.lane
        if lane.program is None or not work.entries:
            return
        if lane.executable is None:
            lane.backend, lane.executable = compile_first(self._backends(work), lane.program, work.batch, self.report)
        try:
            compiles = lane.executable.prepare(work.batch)
        except CompileError as error:  # a size or an alignment that had no gradient before
            if capturing():
                raise
            backends = self._backends(work)
            rest = backends[[b.name for b in backends].index(lane.backend) + 1 :]
            fell_back(self.report, f"{lane.backend} does not run here: {error}. {rest[0].name} runs instead")
            lane.backend, lane.executable = compile_first(rest, lane.program, work.batch, self.report)
            compiles = lane.executable.prepare(work.batch)
        self.report.compiles += max(compiles - lane.compiles, 0)
        lane.compiles = compiles

    def _backends(self, work: Work) -> list[Backend]:
        """The backends to try for a lane, in order."""
        lane = work.lane
        backends = candidates(self.settings.compile if lane.key.dense else "eager", lane.key.device, self.numel)
        if not lane.key.dense:
            self.report.note(
                "parameters that are not dense in memory, in the order that the rule needs, run eagerly one by one"
            )
        if work.shards is not None and (schedule.reductions(lane) or lane.key.recipe.stochastic):
            backends = [b for b in backends if b.name != "triton"]  # whose reductions and noise know one rank's part alone
        return backends

    def _runner(
        self, ahead: int, progress: dict[int, GroupScalars], refreshes: dict[int, dict[str, bool]]
    ) -> Callable[[int], None]:
        """What runs one level of matrix rules."""

        def scalars(g: int, recipe: Recipe) -> dict[str, Tensor]:
            carries = carried(self.core.scalars_of(g), self._transforms[g])
            values = [*numbers(recipe, self.groups[g], carries), *[1.0] * 4]
            return {n: torch.tensor(v, dtype=torch.float64) for n, v in zip(recipe.scalar_names, values, strict=False)}

        def run_level(level: int) -> None:
            self._levels[level].run(ahead, scalars, refreshes, self.core.group_scalars, progress)
            if self._levels[level].partial:
                self.report.note("some matrices of a slab sat a step out: the others were gathered and scattered back")

        return run_level
