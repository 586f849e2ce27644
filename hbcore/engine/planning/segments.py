"""A lane: the parameters that one program updates, and what of them takes part in a step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.placement import Shards, local
from hbcore.engine.backends.base import Batch, Executable
from hbcore.engine.graph.program import NOISE, STACK, Program
from hbcore.engine.graph.segment_spec import Recipe
from hbcore.engine.planning.partition import Course
from hbcore.engine.stacks.stack import Seat, SpreadSeat
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Slot, Transform
from hbcore.state.codec import codec_of
from hbcore.state.steps import Address

Group = dict[str, Any]

SAMPLE = 8
"""How many parameters' state is looked at for having moved."""

_grad = attrgetter("grad")

_same_places: Callable[[list[Tensor], list[int], list[int]], bool] | None = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", None
)
"""Compares addresses in one call; builds of torch for GPUs have it."""


@dataclass(frozen=True)
class LaneKey:
    """What parameters must share to run together. Parameters of several groups may; ``shards`` is mesh and placements."""

    recipe: Recipe
    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    dense: bool
    alone: int | None = None
    shards: tuple[Any, ...] | None = None


@dataclass(eq=False)
class Lane:
    """One program and what runs it.

    Attributes:
        level: how many matrix rules come before it.
        slots: its transforms' slots.
        dtypes: stored tensor -> dtype; ``param`` and ``grad`` first.
        transforms: its chain, with example hyperparameters.
    """

    key: LaneKey
    level: int
    slots: dict[str, Slot]
    dtypes: dict[str, torch.dtype]
    transforms: tuple[Transform, ...]
    program: Program | None = None
    executable: Executable | None = None
    backend: str = ""
    compiles: int = 0

    @property
    def phases(self) -> int:
        """How many passes a step makes."""
        return len(self.program.phases) if self.program else 1


@dataclass(eq=False)
class Entry:
    """A parameter's place in the plan.

    Attributes:
        local: this rank's part of it, which the lanes run on; ``shards`` says how it is spread, None for a whole one.
        held: the state tensors it was planned for, as the optimizer's state has them.
        stored: the same as the lanes see them: this rank's parts.
        primed: whether its rules that prime did so.
    """

    param: Tensor
    local: Tensor
    shards: Shards | None
    group: int
    course: Course
    lanes: tuple[Lane, ...]
    counter: Address
    state: dict[str, Any]
    identity: str
    seats: tuple[Seat | SpreadSeat, ...]
    held: dict[str, Tensor]
    stored: dict[str, Tensor]
    primed: bool = True

    @property
    def numel(self) -> int:
        """How many real numbers the whole parameter is."""
        return self.param.numel() * (2 if self.param.is_complex() else 1)

    @property
    def reach(self) -> int:
        """How many of its lanes take part in a step: not those after a rule that only primes."""
        if self.primed:
            return len(self.lanes)
        return 1 + next(level for level, i in enumerate(self.course.rules) if self.course.transforms[i].primes)

    def column(self, lane: Lane, name: str) -> Tensor:
        """One of the tensors that ``lane`` reads or writes, gradient and noise excepted."""
        if name == "param":
            return self.local
        if name == "update":
            return self.seats[lane.level - 1].column(name)
        if name.startswith(STACK):
            return self.seats[lane.level].column(name.removeprefix(STACK))
        return self.stored[name]


class Work:
    """The parameters of one lane that have a gradient, with their columns laid out; kept while nothing moves.

    Args:
        lane: what runs.
        entries: its parameters.
        places: where each one's step count is among those of all active parameters.
    """

    def __init__(self, lane: Lane, entries: list[Entry], places: list[int]) -> None:
        self.lane, self.everyone, self.places = lane, entries, places
        self.shards = entries[0].shards
        self.here = [i for i, e in enumerate(entries) if e.local.numel()]  # a rank may have no rows of a parameter
        self.entries = [entries[i] for i in self.here]
        self.params = [e.param for e in self.entries]
        self._locals = [e.local for e in self.entries]
        self._pointers = list(map(Tensor.data_ptr, self._locals))
        self._each = list(range(len(self._locals)))
        self._strides = list(map(Tensor.stride, self._locals))
        self._noise = [name for name in lane.dtypes if name.startswith(NOISE)]
        columns: dict[str, list[Tensor]] = {"param": [], "grad": []}
        for name in lane.dtypes:
            if name != "grad" and name not in self._noise:
                columns[name] = [at_least_1d(e.column(lane, name)) for e in self.entries]
        # Code that offloads state swaps the memory under its tensors, and begins with the large ones: looking at those tells.
        largest = sorted(self.entries, key=lambda e: e.local.numel(), reverse=True)[:SAMPLE]
        self._sample = [t for e in largest for name, t in e.stored.items() if name in columns]
        self._places = list(map(Tensor.data_ptr, self._sample))
        self.batch = Batch(columns, [], [], dense=lane.key.dense)
        if self.shards is not None:
            self.batch.numels = [float(e.numel) for e in self.entries]
            self.batch.starts = [sum(shards_before(e)) for e in self.entries]
        self._scalars = () in self._strides
        self._viewed = self.shards is not None or any(p.is_complex() for p in self.params)
        self._contiguous = all(map(Tensor.is_contiguous, self._locals))
        self._base: list[float] | None = None
        self._pairs: list[tuple[int, float]] = []
        # torch checks an assigned gradient's dtype itself, unless a parameter allows any (torch 2.10's grad_dtype=None)
        self._any_dtype = any(getattr(p, "grad_dtype", p.dtype) is None for p in self.params)

    def collect(self) -> bool:
        """Read this step's gradients; False if anything moved so that the plan must be made anew."""
        grads, now = list(map(_grad, self.params)), self.params
        try:
            if self._viewed:
                grads, now = list(map(local, grads)), [local(p.detach()) for p in self.params]
            if self._contiguous:  # the usual case, and a third of the time
                alike = all(map(Tensor.is_contiguous, grads))
            else:
                alike = list(map(Tensor.stride, grads)) == self._strides
            stayed = (
                _same_places(now, self._pointers, self._each)
                if _same_places is not None
                else list(map(Tensor.data_ptr, now)) == self._pointers
            ) and list(map(Tensor.data_ptr, self._sample)) == self._places
        except (AttributeError, RuntimeError, TypeError):  # a sparse gradient has no layout, a missing one nothing at all
            return False
        if not stayed or (self._any_dtype and not all(g.dtype == self.lane.key.grad for g in grads)):
            return False
        if not alike or self._scalars:
            grads = [like(g, p) for g, p in zip(grads, self._locals, strict=True)]
        self.batch.tensors["grad"][:] = grads
        return True

    def rows(self, base: list[float], ahead: int) -> list[tuple[int, float]]:
        """Give each parameter its scalar row; return the (group, step) of each row.

        Args:
            base: the step counts of all active parameters, the same list while they advance together.
            ahead: what to add to them.
        """
        self.batch.sums.clear()
        self.batch.model.clear()
        if self._base is not base:
            index: dict[tuple[int, float], int] = {}
            pairs = ((e.group, base[i]) for e, i in zip(self.everyone, self.places, strict=True))
            rows = [index.setdefault(pair, len(index)) for pair in pairs]
            self.batch.rows = [rows[i] for i in self.here]
            self._base, self._pairs = base, list(index)
        for name in self._noise:
            steps = [int(base[self.places[i]]) + ahead for i in self.here]
            self.batch.keys[name] = [noise_key(e.identity, name, t) for e, t in zip(self.entries, steps, strict=True)]
        return [(group, count + ahead) for group, count in self._pairs]


def shards_before(entry: Entry) -> list[int]:
    """The elements that the ranks before this one have of a spread parameter."""
    return entry.shards.sizes()[: entry.shards.rank] if entry.shards else []


def like(grad: Tensor, param: Tensor) -> Tensor:
    """``grad`` in the memory order of ``param``: itself, or a copy where they differ."""
    if grad.stride() == param.stride() or param.numel() == 1:
        return at_least_1d(grad.detach())
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def noise_key(identity: str, name: str, step: int) -> int:
    """63 bits from what tells one draw from another: seed and parameter, slot, step. The same on every rank."""
    digest = hashlib.blake2b(f"{identity}/{name}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def at_least_1d(tensor: Tensor) -> Tensor:
    """A 0-d tensor as a view of one element: beside another 0-d tensor, a scalar would change its dtype."""
    return tensor.view(1) if tensor.ndim == 0 else tensor


def aligned(tensor: Tensor, param: Tensor) -> bool:
    """Whether both walk through memory in the same order."""
    return all(n == 1 or a == b for n, a, b in zip(param.shape, tensor.stride(), param.stride(), strict=True))


def initial_state(lane: Lane, p: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    """The stored tensors that ``state`` lacks, for ``p``, this rank's part of a parameter, in its memory order."""
    dtype, step = compute_dtype(p.dtype), float(state.get("step", 0.0))
    missing: dict[str, Tensor] = {}
    for name, slot in lane.slots.items():
        codec = codec_of(slot, lane.key.recipe.codec)
        parts = codec.parts(name, dtype)
        if all(part in state for part in parts):
            continue
        blank = {part: torch.zeros_like(p, dtype=d, requires_grad=False) for part, d in parts.items()}
        first = late_start(lane, name, p, step) if step else None
        if first is None and slot.fill:
            first = torch.full_like(p, slot.fill, dtype=dtype)
        missing.update(blank if first is None else codec.write(blank, name, first))
    for name, stored in lane.dtypes.items():  # what param_ecc keeps beside a parameter: nothing to correct yet
        if not is_transient(name) and name not in state and name not in missing:
            missing[name] = torch.zeros_like(p, dtype=stored, requires_grad=False)
    return missing


def late_start(lane: Lane, name: str, p: Tensor, step: float) -> Tensor | None:
    """What the slot ``name`` begins with where ``p`` took ``step`` steps before its rule was there; None for the usual."""
    dtype = compute_dtype(p.dtype)
    for t in lane.transforms:
        if name in t.slots(p):
            value = t.joins(p.to(dtype), torch.tensor(step, dtype=torch.float64)).get(name)
            return None if value is None else value.to(dtype)
    return None


def is_transient(name: str) -> bool:
    """Whether a lane's tensor is there for the step alone, and no part of the state."""
    return name in ("param", "grad", "update") or name.startswith((NOISE, STACK))


def by_lane(entries: Iterable[Entry]) -> list[Work]:
    """Sort entries into one :class:`Work` for each lane, in order of appearance; ``entries`` are all active ones."""
    lanes: dict[Lane, list[tuple[Entry, int]]] = {}
    for i, e in enumerate(entries):
        for lane in e.lanes[: e.reach]:
            lanes.setdefault(lane, []).append((e, i))
    return [Work(lane, [e for e, _ in members], [i for _, i in members]) for lane, members in lanes.items()]
