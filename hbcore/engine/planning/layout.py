"""What was laid out for the parameters that have a gradient, and one step over it; used until something moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from operator import is_not

import torch
from torch import Tensor

from hbcore.engine.addresses import Addresses
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.program import NONFINITE
from hbcore.engine.graph.scalar_inputs import Amp, device_values, numbers
from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.engine.group_scalars import Due, GroupScalars, advanced, carried
from hbcore.engine.offload import Operations
from hbcore.engine.planning.compiling import Compiler
from hbcore.engine.planning.operations import operations_of
from hbcore.engine.planning.segment_batch import SegmentBatch, batches_of
from hbcore.engine.planning.segments import Member
from hbcore.engine.report import Reported
from hbcore.engine.stacks.level import Readings, levels_of
from hbcore.rules.transform import Domain, Transform
from hbcore.state.steps import Selection


class Watch:
    """The groups and the state as they were when a layout was made, to tell whether it still describes them.

    Args:
        core: the optimizer's.
        specs: each group's spec.
        idle: the parameters without a gradient.
        empty: those without elements.
    """

    def __init__(self, core: OptimizerCore, specs: Sequence[SegmentSpec], idle: list[Tensor], empty: list[Tensor]) -> None:
        self._core, self._specs, self._idle, self._empty = core, specs, idle, empty
        self._everyone = [p for group in core.groups for p in group["params"]]
        self._lengths = [len(group["params"]) for group in core.groups]
        self._revision = core.state.revision.count

    def settled(self) -> None:
        """The layout is made, and what it changed in the state is its own doing."""
        self._revision = self._core.state.revision.count

    def unchanged(self) -> bool:
        """Whether groups, state and the set of parameters with a gradient are the same."""
        groups, state = self._core.groups, self._core.state
        if state.revision.count != self._revision or len(groups) != len(self._specs):
            return False
        for group, spec, length in zip(groups, self._specs, self._lengths, strict=True):
            if len(group["params"]) != length or not spec.fits(group):
                return False
        if any(map(is_not, chain.from_iterable([group["params"] for group in groups]), self._everyone)):
            return False
        for p in self._idle:
            if p.grad is not None:
                return False
        return not any(map(Tensor.numel, self._empty))


class Layout:
    """The members with a gradient, sorted into batches and levels of matrix rules, and the operations of a step over them.

    Args:
        core: the optimizer's.
        members: the active parameters.
        compiler: traces and compiles what is new.
        watch: tells whether the layout still holds.

    Attributes:
        params: the active parameters themselves.
        priming: whether the coming step only prepares some parameters' state.
        operations: what a step runs, in order.
    """

    def __init__(self, core: OptimizerCore, members: list[Member], compiler: Compiler, watch: Watch) -> None:
        self.core, self.members, self._compiler, self._watch = core, members, compiler, watch
        self.params = [m.param for m in members]
        self.levels = levels_of(members, compiler.tools)
        for level in self.levels:
            level.open()  # batches have views of the inputs, which need memory
        self.batches = batches_of(members)
        for batch in self.batches:
            compiler.trace(batch.segment)
        self._selection = Selection([m.counter for m in members], [m.primed for m in members])
        self.priming = self._selection.partial
        self._state = Addresses([m.twins[n].home if n in m.twins else t for m in members for n, t in m.stored.items()])
        self._model_numel = float(sum(m.numel for m in members))
        self._stepping = stepping(members)
        self._coming: dict[int, GroupScalars] = {}
        self._due: dict[int, dict[str, Due]] = {}
        self.operations = Operations()
        watch.settled()

    def holds(self) -> bool:
        """Whether the groups, the state, its memory and the parameters with a gradient are still those that were laid out."""
        if self.priming or not self._watch.unchanged():
            return False
        # nobody can move memory that nobody was handed; reading all those addresses takes longer than launching a kernel
        return not self.core.exposed or self._state.unchanged()

    def collect(self) -> bool:
        """Read this step's gradients; False if one of the tensors lies elsewhere, so that a new layout is needed."""
        for level in self.levels:
            if level.open():
                for batch in self.batches:
                    batch.moves += 1
        return all(map(SegmentBatch.collect, self.batches))

    def fill(self, amp: Amp) -> None:
        """Bring the step's numbers to where the operations read them. Everything compiles before anything is written."""
        core, journeys = self.core, self.operations.journeys
        if journeys is not None:
            journeys.begin()
        base, ahead = self._selection.coming(trusted=core.chain.settings.capturable)
        carries, every = dict[int, dict[str, float]](), core.all_scalars()
        for g, transforms in self._stepping.items():
            scalars = every[g]
            self._coming[g], self._due[g] = advanced(scalars, transforms)
            carries[g] = carried(scalars, transforms) if transforms else {}
        read: Readings = {}
        changed = not self.operations
        for batch in self.batches:
            rows = batch.assign_rows(base, ahead)
            if core.chain.settings.capturable:
                batch.values = self._device_values(batch, rows, amp)
            else:
                self._host_values(batch, rows, carries, read)
            changed = self._compiler.prepare(batch) or changed
        for level in self.levels:
            level.fill(base, ahead, read, self._due, self._coming)
        if self.levels and any(level.curved for level in self.levels):
            pairs = core.pairs.hand_over()  # the levels give them back as they run
            for level in self.levels:
                level.curved.take(pairs, self._due)
        if changed:
            if journeys is not None:
                journeys.close()
            self.operations = operations_of(self.batches, self.levels, core)
            core.report.backend = "+".join(sorted({b.segment.backend for b in self.batches} - {""})) or core.report.backend

    def advance(self, amp: Amp) -> None:
        """Count the step, and keep what the groups carry to the next one."""
        core, found = self.core, self.batches[0].model.get(NONFINITE) if self.batches else None
        by = 1 if amp.found_inf is None else (amp.found_inf == 0).float()
        if found is not None and core.settings.capturable:
            core.skipping.add(found)
            by = by * (found == 0).float()
        self._selection.advance(by)
        for batch in self.batches:
            if batch.carried:
                self._take_carried(batch)
        every = core.all_scalars()
        before = {g: dict(every[g]) for g in self._coming} if found is not None else {}
        for g, scalars in self._coming.items():
            every[g].update(scalars)
        # kernels write where autograd does not see it: a graph that saved a parameter must know that it changed
        torch.autograd.graph.increment_version(self.params)
        for level in self.levels:
            for note in level.notes:
                core.report.note(note)
        if core.chain.settings.report_norms:
            core.report.norms = [Reported([m.param for m in b.everyone], **b.reported) for b in self.batches if b.reported]
        primed = [m for m in self.members if not m.primed] if self.priming else []
        for m in primed:
            m.primed = True
        if found is not None and not core.settings.capturable:
            core.skipping.expect(partial(self._retract, before, primed))

    def _take_carried(self, batch: SegmentBatch) -> None:
        """Read the carried numbers that depend on reductions, for which the host waits."""
        first = {m.group: i for i, m in reversed([*enumerate(batch.everyone)])}
        for name, values in batch.carried.items():
            for g, value in zip(first, values[[*first.values()]].tolist(), strict=True):
                self._coming[g][name] = value

    def _retract(self, before: Mapping[int, GroupScalars], primed: Sequence[Member]) -> None:
        """The step changed nothing: take back what :meth:`advance` counted."""
        self._selection.retract()
        for g, scalars in before.items():
            now = self.core.scalars_of(g)
            now.clear()
            now.update(scalars)
        for m in primed:
            m.primed = False

    def release(self) -> None:
        """Let go of the step's gradients, of the memory for stack inputs, and of that for offloaded state, once it is home."""
        if self.operations.journeys is not None:
            self.operations.journeys.close()
        for batch in self.batches:
            batch.release()
        for level in self.levels:
            level.close()

    def lend(self) -> None:
        """Somebody was handed state tensors: keep no view of their memory."""
        for batch in self.batches:
            batch.lend()

    def drop(self) -> None:
        """Let go of every tensor, at once: the layout is not used any more."""
        self.operations = Operations()
        for batch in self.batches:
            batch.drop()

    def reread(self) -> None:
        """State tensors were written to in place: read the step counters again."""
        self._selection.forget()

    def _host_values(
        self, batch: SegmentBatch, rows: list[tuple[int, float]], carries: dict[int, dict[str, float]], read: Readings
    ) -> None:
        """One row of numbers for each (group, step), and what the groups will carry for the batch's rules."""
        segment, groups, model = batch.segment, self.core.groups, self._model_numel
        spec, values = segment.key.spec, []
        names = spec.numbered
        for g, count in rows:
            given = read.get((g, names))
            if given is None:
                given = read[g, names] = numbers(spec, groups[g], carries[g])
            values.append([*given, count, model])
        batch.values = values
        if segment.program is not None and segment.program.carries:
            for (g, _), row in zip(rows, values, strict=True):
                self._coming[g].update(segment.program.carried(row))

    def _device_values(self, batch: SegmentBatch, rows: list[tuple[int, float]], amp: Amp) -> list[list[Tensor]]:
        """The same as tensors on the device, for steps that may be captured."""
        spec, groups = batch.segment.key.spec, self.core.groups
        steps = [batch.members[batch.rows.index(i)].stored["step"] + 1 for i in range(len(rows))]
        return [device_values(spec, groups[g], step, amp, self._model_numel) for (g, _), step in zip(rows, steps, strict=True)]


def stepping(members: Sequence[Member]) -> dict[int, list[Transform]]:
    """For each active group, its transforms that count steps: matrix rules, for their refreshes, and those with scalars."""
    found: dict[int, list[Transform]] = {}
    for partition, g in {id(m.partition): (m.partition, m.group) for m in members}.values():
        counting = [t for t in partition.transforms if t.domain == Domain.MATRIX or t.scalars()]
        found.setdefault(g, []).extend(counting)
    return found
