"""A segment and the parameters that run in it: what they share, and what the plan knows of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.placement import Shards
from hbcore.engine.backends.base import Executable
from hbcore.engine.graph.program import NOISE, STACK, Bits, Program
from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.engine.offload import Twin
from hbcore.engine.planning.partition import Partition
from hbcore.engine.stacks.flat_stack import View
from hbcore.rules.transform import Slot, Transform
from hbcore.state.steps import Address


@dataclass(frozen=True)
class SegmentKey:
    """What parameters must share to run together. Parameters of several groups may; ``shards`` is mesh and placements, and
    ``share`` counts the parts in which offloaded state travels."""

    spec: SegmentSpec
    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    dense: bool
    alone: tuple[int, int] | None = None
    shards: tuple[Any, ...] | None = None
    share: int = 0


@dataclass(eq=False)
class Segment:
    """One program and what runs it.

    Attributes:
        level: how many matrix rules come before it.
        slots: its transforms' slots.
        dtypes: stored tensor -> dtype; ``param`` and ``grad`` first.
        transforms: its part of the chain, with example hyperparameters.
        per_block: the stored tensors that have one entry for each block of elements.
        noise: where the random inputs for rounding lie in words of random bits.
        program: its graph; None before it is traced, and if it could not be.
        executable: what runs it, on the backend called ``backend``; None before it is compiled.
    """

    key: SegmentKey
    level: int
    slots: dict[str, Slot]
    dtypes: dict[str, torch.dtype]
    transforms: tuple[Transform, ...]
    per_block: frozenset[str] = frozenset()
    noise: Mapping[str, Bits] = field(default_factory=dict)
    program: Program | None = None
    executable: Executable | None = None
    backend: str = ""

    @property
    def phases(self) -> int:
        """How many passes over its parameters a step makes."""
        return len(self.program.phases) if self.program else 1


@dataclass(eq=False)
class Member:
    """A parameter in the plan.

    Attributes:
        local: this rank's part of it, which the segments run on; ``shards`` says how it is sharded, None for a whole one.
        held: the state tensors it was planned for, as the optimizer's state has them.
        stored: the same as the segments see them: this rank's parts, or their twins on the device if they are offloaded.
        addresses: where those lie in memory.
        views: where each matrix rule of the partition sees it.
        seed_key: what its noise is drawn by.
        primed: whether its rules that prime did so.
        twins: of the segments' state that is offloaded.
        pieces: members in place of this one, each with some of its elements, if all of its state is too much to visit the
            device at once.
        elements: those that a piece has of its parameter.
    """

    param: Tensor
    local: Tensor
    shards: Shards | None
    group: int
    partition: Partition
    segments: tuple[Segment, ...]
    counter: Address
    state: dict[str, Any]
    seed_key: str
    views: Sequence[View]
    held: dict[str, Tensor]
    stored: dict[str, Tensor]
    addresses: dict[str, int]
    primed: bool = True
    twins: Mapping[str, Twin] = field(default_factory=dict)
    pieces: Sequence[Member] = ()
    elements: slice | None = None

    @property
    def numel(self) -> int:
        """How many real numbers the whole parameter is."""
        return self.param.numel() * (2 if self.param.is_complex() else 1)

    @property
    def reach(self) -> int:
        """How many of its segments take part in a step: not those after a rule that only primes."""
        if self.primed:
            return len(self.segments)
        return 1 + next(level for level, i in enumerate(self.partition.rules) if self.partition.transforms[i].primes)

    def rule_at(self, level: int) -> Transform:
        """The matrix rule with ``level`` others before it, with example numbers."""
        return self.partition.transforms[self.partition.rules[level]]

    def lend(self) -> None:
        """Leave the state's memory to the tensors in :attr:`state`: whoever has those may free it."""
        for view in self.views:
            for _, stack, _ in view.runs:
                stack.lend()

    def column(self, segment: Segment, name: str) -> Tensor:
        """One of the tensors that ``segment`` reads or writes, gradient and noise excepted."""
        if name == "param":
            return self.local
        if name == "update":
            return self.views[segment.level - 1].column(name)
        if name.startswith(STACK):
            return self.views[segment.level].column(name.removeprefix(STACK))
        return self.stored[name]


def aligned(tensor: Tensor, param: Tensor) -> bool:
    """Whether both walk through memory in the same order."""
    return all(n == 1 or a == b for n, a, b in zip(param.shape, tensor.stride(), param.stride(), strict=True))


def is_transient(name: str) -> bool:
    """Whether a segment's tensor exists only during a step, and is not part of the state."""
    return name in ("param", "grad", "update") or name.startswith((NOISE, STACK))
