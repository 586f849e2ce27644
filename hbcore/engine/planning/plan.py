"""A step, from a group's gradients to the operations that update its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from hbcore.distributed.placement import local, shards_of
from hbcore.engine.backends.base import is_dense
from hbcore.engine.core import Group, OptimizerCore
from hbcore.engine.graph.program import shared_words
from hbcore.engine.graph.scalar_inputs import NO_AMP, Amp, capturing
from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.engine.planning.compiling import Compiler
from hbcore.engine.planning.flat_init import NewMember, belongs, companions, is_flat
from hbcore.engine.planning.layout import Layout, Watch
from hbcore.engine.planning.partition import Partition, example, partition
from hbcore.engine.planning.segments import Member, Segment, SegmentKey
from hbcore.engine.planning.shares import Share, divisible, shares_of
from hbcore.engine.planning.state_init import StateInit
from hbcore.engine.precision import autocast_off, autocasting
from hbcore.errors import CompileError, ParameterError, SparseGradientError
from hbcore.rules import route
from hbcore.rules.transform import Transform
from hbcore.state.codec_choice import fitting
from hbcore.state.expected import by_rows


class Plan:
    """What runs an optimizer's steps. Parameters enter it when they first show a gradient.

    Args:
        core: the optimizer's.

    Attributes:
        members: the parameters that have state.
        segments: every segment that was compiled, or will be.
        layout: the members with a gradient, laid out; None where something changed since.
    """

    def __init__(self, core: OptimizerCore) -> None:
        self.core = core
        self.members: dict[Tensor, Member] = {}
        self.segments: dict[SegmentKey, Segment] = {}
        self.layout: Layout | None = None
        self._compiler = Compiler(core, self._numel())
        self._planning, self._lent = False, False
        self._parted: set[int] = set()
        self._specs: list[SegmentSpec] = []
        self._forks: list[tuple[Transform, ...]] = []
        self._shares: dict[Tensor, Share] = {}
        self._partitions: dict[tuple[int, tuple[bool, ...], torch.dtype, str], Partition] = {}
        core.state.revision.watchers.add(self)

    def step(self, amp: Amp = NO_AMP) -> list[Tensor]:
        """Run one step for every parameter that has a gradient; return those parameters."""
        if autocasting():
            with autocast_off():
                return self.step(amp)
        if self.core.skipping.pending is not None:
            self.core.skipping.settle()
        layout = self._laid_out()
        try:
            layout.fill(amp)
            launches = 0
            for run in layout.operations:
                launches += run()
            layout.advance(amp)
        finally:
            layout.release()
        self.core.report.launches = launches
        return layout.params

    def reread(self) -> None:
        """State tensors were written to in place: read the step counters again."""
        if self.layout is not None:
            self.layout.reread()

    def forget(self, param: Tensor | None) -> None:
        """The state of ``param``, or of all parameters, was written to from outside: let go of its memory at once."""
        if self._planning:
            return
        gone = list(self.members) if param is None else [param] if param in self.members else []
        for m in map(self.members.pop, gone):
            m.lend()
            self._part(m)
        if gone and self.layout is not None:
            self.layout.drop()
            self.layout = None

    def lend(self) -> None:
        """Somebody was handed state tensors, and may free their memory: keep no view of it."""
        if self._lent:
            return
        self._lent = True
        for m in self.members.values():
            m.lend()
        if self.layout is not None:
            self.layout.lend()

    def _laid_out(self) -> Layout:
        """The layout for the present gradients, which it has read."""
        self._lent = False
        layout = self.layout
        if layout is not None:
            if layout.holds() and layout.collect():
                return layout
            layout.release()
        if capturing():
            raise CompileError(
                "the parameters that have a gradient, or where they lie, changed since the last step; "
                "run a whole step outside the capture first, with the gradients that the captured one will have."
            )
        self.layout = None  # should this fail, the next step begins anew
        self._planning = True
        try:
            layout = self._lay_out()
        finally:
            self._planning = False
        if not layout.collect():
            layout.release()
            raise AssertionError("a parameter's memory changed while it was planned")
        self.layout = layout
        return layout

    def _lay_out(self) -> Layout:
        """Find the parameters with a gradient, and give new ones their state and a step counter."""
        self._refit()
        init = StateInit(self.core)
        active: list[Tensor] = []
        idle: list[Tensor] = []
        empty: list[Tensor] = []
        present = {p for group in self.core.groups for p in group["params"]}
        for m in [m for p, m in self.members.items() if p not in present]:
            self._part(self.members.pop(m.param))
        if present != self._shares.keys():
            self._shares = shares_of(self.core)
        for g, group in enumerate(self.core.groups):
            for i, p in enumerate(group["params"]):
                if not p.numel() or p.grad is None:
                    (idle if p.numel() else empty).append(p)
                    continue
                active.append(p)
                self._admit(g, i, p, init)
        self._reunite(init, idle)
        self.members.update(init.members())
        watch = Watch(self.core, list(self._specs), idle, empty)
        return Layout(self.core, self._grouped(self.members[p] for p in active), self._compiler, watch)

    def _part(self, m: Member) -> None:
        """A member is none any more: if a flat rule saw it, the vector that it was a part of is to be made again."""
        if is_flat(m.partition) and self.core.settings.multi_tensor:
            self._parted.add(m.group)

    def _reunite(self, init: StateInit, idle: Iterable[Tensor]) -> None:
        """Have all parts of a flat rule's vector planned, where one of them is: those without a gradient too."""
        state, idle = self.core.state, set(idle)
        for g, group in enumerate(self.core.groups):
            for i, p in enumerate(group["params"]):
                if p in idle and p in state and p not in self.members and belongs(state[p], self._partition(g, group, p)):
                    self._admit(g, i, p, init)
        groups = init.rejoining() | self._parted
        self._parted = set()
        for n in companions(self.members.values(), groups, init.params()) if groups else ():
            init.add(n)

    def _grouped(self, active: Iterable[Member]) -> list[Member]:
        """The members of the coming layout; plans for sparse gradients put others in their place."""
        return list(active)

    def _refit(self) -> None:
        """Describe the groups whose structure changed."""
        chain, groups = self.core.chain, self.core.groups
        del self._specs[len(groups) :], self._forks[len(groups) :]
        for g, group in enumerate(groups):
            if g == len(self._specs):
                self._specs.append(chain.spec(group))
                self._forks.append(chain.forked(group))
            elif not self._specs[g].fits(group):
                self._specs[g], self._forks[g] = chain.spec(group), chain.forked(group)
            else:
                continue
            self._partitions = {key: some for key, some in self._partitions.items() if key[0] != g}

    def _admit(self, g: int, i: int, p: Tensor, init: StateInit) -> None:
        """Have a parameter planned, if it is new or not as it was planned."""
        group = self.core.groups[g]
        part = self._partition(g, group, p)
        segments = tuple(self._segment(part, level, p, g, i) for level in range(len(part.segments)))
        known = self.members.get(p)
        if known is not None and known.local.shape != local(p.detach()).shape and self.core.state[p]:
            raise ParameterError(
                f"{self.core.name_of(g, i)} was given data of another shape; its state is for {tuple(known.local.shape)}. "
                "Delete the state (del optimizer.state[p]) to start it afresh, or build a new optimizer."
            )
        if known is None or known.group != g or known.segments != segments or not init.holds(known):
            init.add(NewMember(g, p, part, segments, self._pieces(part, p, g, i, segments[0])))

    def _pieces(self, part: Partition, p: Tensor, g: int, i: int, whole: Segment) -> tuple[Segment, ...]:
        """The segments of a parameter whose offloaded state is too much for one; none if it cannot be cut."""
        first, count = self._shares[p]
        if count == 1 or part.rules or part.segments[0].numbers or p.is_complex() or not p.is_contiguous():
            return ()
        self._compiler.trace(whole)
        if not divisible(whole.program):
            return ()
        return tuple(self._segment(part, 0, p, g, i, share) for share in range(first, first + count))

    def _partition(self, g: int, group: Group, p: Tensor) -> Partition:
        branches = route.branches(self._forks[g], p)
        codec = fitting(self._specs[g].codec, p.shape, by_rows(p))
        key = (g, branches, p.dtype, codec.name)
        if key not in self._partitions:
            spec = replace(self._specs[g], branches=branches, codec=codec)
            self._partitions[key] = partition(spec, group, p, self.core.settings.promote)
        return self._partitions[key]

    def _segment(self, part: Partition, level: int, p: Tensor, g: int, i: int, share: int | None = None) -> Segment:
        grad = self._gradient(p, g, i)
        here, shards = local(p.detach()), shards_of(p)
        dense = is_dense(here) if not part.rules else here.is_contiguous()  # a stack's rows lie in logical order
        alone = None if self.core.settings.multi_tensor else (g, i)
        mesh = None if shards is None else (shards.mesh, shards.placements)
        spec, received = part.segments[level], local(grad).dtype
        share = self._shares[p].first if share is None else share
        key = SegmentKey(spec, here.device, here.dtype, received, dense or not here.numel(), alone, mesh, share)
        if key not in self.segments:
            transforms = spec.transforms(example(spec, self.core.groups[g]))
            slots = {name: slot for t in transforms for name, slot in t.slots(p).items()}
            dtypes, noise = spec.dtypes(here, received, slots), spec.noise(here.dtype, slots)
            made = Segment(key, level, slots, dtypes, transforms, spec.per_block(slots), shared_words(noise))
            self.segments[key] = made
        return self.segments[key]

    def _gradient(self, p: Tensor, g: int, i: int) -> Tensor:
        """A parameter's gradient as a dense tensor of its dtype.

        Raises:
            SparseGradientError: it is sparse.
        """
        grad = p.grad
        if grad is None:  # zeros in a flat rule's vector
            return p
        if grad.layout != torch.strided:
            raise SparseGradientError(
                f"{self.core.name_of(g, i)} has a sparse gradient ({grad.layout}); use an optimizer for sparse gradients "
                "(SparseAdam), or make the layer dense (nn.Embedding(..., sparse=False))."
            )
        return grad

    def _numel(self) -> int:
        """The elements that ``compile="auto"`` judges by."""
        return sum(p.numel() for group in self.core.groups for p in group["params"])
