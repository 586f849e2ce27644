"""How parameters enter a plan: with the state that they have, and initial values for what they lack of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.exchange import owners
from hbcore.distributed.placement import gathered, local, shards_of, spread_like, spread_part
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.scalar_inputs import numbers
from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.engine.group_scalars import carried
from hbcore.engine.offload import Twin, applies, homed
from hbcore.engine.planning.flat_init import FlatInit, NewMember, belongs, move_in
from hbcore.engine.planning.segments import Member, Segment, aligned, is_transient
from hbcore.engine.planning.shares import pieces_of
from hbcore.engine.stacks.bound_rule import BoundRule
from hbcore.engine.stacks.flat_stack import FlatView, View
from hbcore.engine.stacks.key import StackKey
from hbcore.engine.stacks.stack import ShardedView, Stack, StackView
from hbcore.errors import ParameterError, RuleError, StateWarning
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Domain, Transform
from hbcore.rules.views import Block
from hbcore.state.blocks import block_shape
from hbcore.state.codec_choice import codec_of, part_shape
from hbcore.state.expected import expected
from hbcore.state.steps import Address, open_counters
from hbcore.warn import warn_at_caller


class StateInit:
    """Collects new members, then gives them their state together: one table of counters, one stack for each kind of block."""

    def __init__(self, core: OptimizerCore) -> None:
        self.core = core
        self._new: list[NewMember] = []
        self._shared: dict[str, Tensor | None] = {}
        self._reads: dict[tuple[int, int], tuple[int, ...]] = {}
        self._flat = FlatInit(core)

    def add(self, new: NewMember) -> None:
        """Take in a parameter with the others."""
        self._new.append(new)

    def rejoining(self) -> set[int]:
        """The groups in which a part of a flat rule's vector is planned anew, and therefore all of it."""
        if not self.core.settings.multi_tensor:
            return set()
        return {n.group for n in self._new if belongs(self.core.state.get(n.param, {}), n.partition)}

    def params(self) -> set[Tensor]:
        """The parameters that were added."""
        return {n.param for n in self._new}

    def holds(self, member: Member) -> bool:
        """Whether the optimizer's state still holds the very tensors that were planned for."""
        state = self.core.state[member.param]
        walked = {name for segment in member.segments for name in segment.dtypes if not is_transient(name)}
        walked -= {name for segment in member.segments for name in (*segment.key.spec.numbers, *segment.per_block)}
        part = local(member.param.detach())
        if part.data_ptr() != member.local.data_ptr() or part.stride() != member.local.stride() or state is not member.state:
            return False
        return all(
            state.get(name) is tensor
            and local(tensor).data_ptr() == member.addresses[name]
            and (name not in walked or aligned(member.stored[name], part))
            for name, tensor in member.held.items()
        )

    def members(self) -> dict[Tensor, Member]:
        """Make a member of each parameter that was added."""
        addresses, views = self._addresses(), self._views()
        return {n.param: self._member(n, addresses[n.param], views[n.param]) for n in self._new}

    def _member(self, n: NewMember, address: Address, views: list[View]) -> Member:
        p, state, part = n.param, self.core.state[n.param], local(n.param.detach())
        elementwise = self._elementwise(n, part, state)
        names = ["step", *elementwise]
        touched = float(state.get("step", 0.0)) > 0
        for i, view in zip(n.partition.rules, views, strict=False):
            touched = self._move_in(n, n.partition.transforms[i], view, state) or touched
            names += view.state()
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RuleError(f"two rules of one chain claim the slot {twice[0]!r} of a parameter; rename one of them.")
        state["step"] = address.view()
        held = {name: state[name] for name in names}
        away = [] if n.pieces or not applies(self.core.settings.offload, part.device) else elementwise
        numbers = {name for segment in n.segments for name in segment.key.spec.numbers}
        twins = {name: Twin.of(held, name, part.device) for name in away if name not in numbers}
        member = Member(
            param=p,
            local=part,
            shards=shards_of(p),
            group=n.group,
            partition=n.partition,
            segments=n.segments,
            counter=address,
            state=state,
            seed_key=self.core.seed_key(n.group, p),
            views=views,
            held=held,
            stored={name: twins[name].tensor if name in twins else local(t) for name, t in held.items()},
            addresses={name: local(t).data_ptr() for name, t in held.items()},
            primed=touched or not n.partition.primes,
            twins=twins,
        )
        return replace(member, pieces=pieces_of(member, n.pieces)) if n.pieces else member

    def _elementwise(self, n: NewMember, part: Tensor, state: dict[str, Any]) -> list[str]:
        """Complete the state of the segments' slots, in the parameter's memory order; return its names."""
        names: list[str] = []
        for segment in n.segments:
            numbers = segment.key.spec.numbers
            for name, t in initial_state(segment, part, state).items():
                state[name] = t if name in numbers else spread_part(t, n.param)
            for name in numbers if not float(state.get("step", 0)) else ():
                self._share(n, name, state[name])
            for name, dtype in segment.dtypes.items():
                if is_transient(name):
                    continue
                if not (name.startswith("param#") and name in names):  # every segment reads what param_ecc keeps
                    names.append(name)
                old = local(state[name])
                if name in numbers and not old.ndim:
                    state[name] = old.to(part.device, dtype)
                    continue
                by_block = name in segment.per_block
                if old.shape != (block_shape(part.shape) if by_block else part.shape):
                    raise ParameterError(
                        f"{self._who(n)} has state {name!r} of shape {tuple(old.shape)}; delete it (del optimizer.state[p]) to "
                        "start afresh."
                    )
                if by_block:
                    if old.dtype != dtype or not old.is_contiguous():
                        state[name] = spread_part(old.to(dtype).contiguous(), n.param)
                elif old.dtype != dtype or not aligned(old, part):
                    moved = torch.empty_like(part, dtype=dtype, requires_grad=False).copy_(old)
                    state[name] = spread_like(moved, n.param)
                if applies(self.core.settings.offload, part.device):
                    state[name] = homed(state[name], part.device)
        return names

    def _share(self, n: NewMember, name: str, number: Tensor) -> None:
        """Let a scalar slot of a rule that sees the model begin with the value that the other parameters have by now."""
        if not any(t.domain == Domain.MODEL and name in t.slots(n.param) for t in n.partition.transforms):
            return
        if name not in self._shared:
            everyone = [p for group in self.core.groups for p in group["params"]]
            held: list[Mapping[str, Any]] = [self.core.state.get(p, {}) for p in everyone]
            self._shared[name] = next((s[name] for s in held if name in s and float(s.get("step", 0)) > 0), None)
        shared = self._shared[name]
        if shared is not None:
            number.copy_(shared)

    def _who(self, n: NewMember) -> str:
        params = self.core.groups[n.group]["params"]
        return self.core.name_of(n.group, next(i for i, p in enumerate(params) if p is n.param))

    def _move_in(self, n: NewMember, rule: Transform, view: View, state: dict[str, Any]) -> bool:
        """Move what the state has of a matrix rule's own slots into the stacks; return whether it differed from initial values.

        Collective for a sharded parameter whose state is sharded too, as a checkpoint leaves it: all of it goes to the owner.
        """
        if isinstance(view, FlatView):
            move_in(view, state, lambda: self._who(n))
            return False
        views = view.state()
        codec = n.segments[0].key.spec.codec
        slots = {part: slot for slot in expected([rule], n.param, codec) for part in slot.parts(n.param)}
        touched = False
        for name in [name for name in slots if name in state and (name in views or isinstance(view, ShardedView))]:
            whole = gathered(state[name])
            blank = slots[name].blank(whole)[name]
            if whole.shape != blank.shape:
                warn_at_caller(
                    f"state {name!r} of shape {tuple(whole.shape)} starts afresh with {tuple(blank.shape)}, as the present "
                    "options ask for.",
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
        """A counter for each new member, which goes on from where its state says."""
        capturable = self.core.settings.capturable
        devices = {n.param: n.param.device if capturable else torch.device("cpu") for n in self._new}
        addresses: dict[Tensor, Address] = {}
        for device in set(devices.values()):
            there = [p for p, d in devices.items() if d == device]
            opened = open_counters([float(self.core.state[p].get("step", 0.0)) for p in there], device)
            addresses.update(zip(there, opened, strict=True))
        return addresses

    def _views(self) -> dict[Tensor, list[View]]:
        """Views of new stacks: late parameters open stacks of their own, so that nobody else's state moves."""
        rows: dict[StackKey, list[str]] = {}
        rules: dict[StackKey, tuple[Transform, dict[str, torch.dtype]]] = {}
        plans: list[tuple[NewMember, list[list[tuple[Block, StackKey, int]]]]] = []
        owner_of = owners(p for group in self.core.groups for p in group["params"])
        for n in self._new:
            shards = shards_of(n.param)
            levels: list[list[tuple[Block, StackKey, int]]] = []
            step = float(self.core.state[n.param].get("step", 0.0))
            for segment, i in zip(n.segments, n.partition.rules, strict=False):
                rule, level = n.partition.transforms[i], []
                elsewhere = rule.flat or (shards is not None and owner_of[n.param] != shards.rank)
                for k, block in enumerate(() if elsewhere else rule.blocks(n.param.shape)):
                    spec, device = segment.key.spec, segment.key.device
                    reads, away = self._read(n, spec, i), applies(self.core.settings.offload, device)
                    key = StackKey(spec, i, reads, step, block.shape, n.param.dtype, device, away)
                    rules[key] = (rule, dict(spec.feeds))
                    names = rows.setdefault(key, [])
                    level.append((block, key, len(names)))
                    seed_key = self.core.seed_key(n.group, n.param)
                    names += [f"{seed_key}/{k}.{j}" for j in range(block.batch)]
                levels.append(level)
            plans.append((n, levels))
        stacks = {key: Stack(key, *rules[key], names, self._reads[id(key.spec), key.index]) for key, names in rows.items()}
        flat = self._flat.views(self._new)
        every = {n.param: _views_of(n, levels, stacks, owner_of) for n, levels in plans}
        return {p: [flat.get((p, level), view) for level, view in enumerate(views)] for p, views in every.items()}

    def _read(self, n: NewMember, spec: SegmentSpec, index: int) -> tuple[float, ...]:
        """Those of a group's numbers that a matrix rule reads."""
        if (id(spec), index) not in self._reads:
            self._reads[id(spec), index] = BoundRule(spec, index).reads
        carries = carried(self.core.carried(n.group), n.partition.transforms)
        values = numbers(spec, self.core.groups[n.group], carries)
        return tuple(values[k] for k in self._reads[id(spec), index])


def _views_of(
    n: NewMember,
    levels: list[list[tuple[Block, StackKey, int]]],
    stacks: dict[StackKey, Stack],
    owner_of: dict[Tensor, int],
) -> list[StackView | ShardedView]:
    whole = [StackView(n.param.shape, [(block, stacks[key], row) for block, key, row in level]) for level in levels]
    shards, part = shards_of(n.param), local(n.param.detach())
    if shards is None:
        return [*whole]
    return [
        ShardedView(shards, owner_of[n.param], view, part, dict(segment.key.spec.feeds))
        for view, segment in zip(whole, n.segments, strict=False)
    ]


def initial_state(segment: Segment, p: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    """The stored tensors that ``state`` lacks, for ``p``, this rank's part of a parameter, in its memory order."""
    dtype, step = compute_dtype(p.dtype), float(state.get("step", 0.0))
    missing: dict[str, Tensor] = {}
    for name, slot in segment.slots.items():
        codec = codec_of(name, slot, segment.key.spec.codec)
        parts = codec.parts(name, dtype)
        if all(part in state for part in parts):
            continue
        if slot.scalar:
            missing[name] = torch.full((), slot.fill, dtype=dtype, device=p.device)
            continue
        blank = {part: _zeros(p, part_shape(codec, name, part, p.shape), d) for part, d in parts.items()}
        first = late_start(segment, name, p, step) if step else None
        if first is None and slot.fill:
            first = torch.full_like(p, slot.fill, dtype=dtype)
        missing.update(blank if first is None else codec.write(blank, name, first))
    for name, stored in segment.dtypes.items():  # what param_ecc keeps beside a parameter: nothing to correct yet
        if not is_transient(name) and name not in state and name not in missing:
            missing[name] = torch.zeros_like(p, dtype=stored, requires_grad=False)
    return missing


def _zeros(p: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros on ``p``'s device, in its memory order if they are of its shape."""
    if shape == p.shape:
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    return torch.zeros(shape, dtype=dtype, device=p.device)


def late_start(segment: Segment, name: str, p: Tensor, step: float) -> Tensor | None:
    """What the slot ``name`` begins with where ``p`` took ``step`` steps before its rule was added; None for the usual."""
    dtype = compute_dtype(p.dtype)
    for t in segment.transforms:
        if name in t.slots(p):
            value = t.joins(p.to(dtype), torch.tensor(step, dtype=torch.float64, device="cpu")).get(name)
            return None if value is None else value.to(dtype, copy=True)  # a rule may return the parameter itself
    return None
