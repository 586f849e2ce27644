"""A lane: the parameters that one program updates, and what of them takes part in a step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.backend import Batch, Executable
from hbcore.engine.program import NOISE, Program
from hbcore.engine.recipe import Recipe
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Transform
from hbcore.state.steps import Address

Group = dict[str, Any]

SAMPLE = 8
"""How many parameters' state is looked at for having moved."""

_grad = attrgetter("grad")


@dataclass(frozen=True)
class LaneKey:
    """What parameters must share to run together. Parameters of several groups may."""

    recipe: Recipe
    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    dense: bool
    alone: int | None = None


@dataclass(eq=False)
class Lane:
    """One program and what runs it.

    Attributes:
        slots: logical slot -> the value it starts with.
        dtypes: stored tensor -> dtype; ``param`` and ``grad`` first.
        transforms: its chain, with example hyperparameters.
    """

    key: LaneKey
    slots: dict[str, float]
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
    """A parameter's place in the plan, with the state tensors it was planned for."""

    param: Tensor
    group: int
    lane: Lane
    counter: Address
    state: dict[str, Any]
    identity: str
    stored: dict[str, Tensor] = field(default_factory=dict)


class Work:
    """The parameters of one lane that have a gradient, with their columns laid out; kept while nothing moves."""

    def __init__(self, lane: Lane, entries: list[Entry]) -> None:
        self.lane, self.entries = lane, entries
        self.params = [e.param for e in entries]
        self._pointers = list(map(Tensor.data_ptr, self.params))
        self._strides = list(map(Tensor.stride, self.params))
        columns: dict[str, list[Tensor]] = {"param": [at_least_1d(p.detach()) for p in self.params], "grad": []}
        self._noise = [name for name in lane.dtypes if name.startswith(NOISE)]
        stored = [name for name in lane.dtypes if name not in (*columns, *self._noise)]
        columns.update({name: [at_least_1d(e.stored[name]) for e in entries] for name in stored})
        # Code that offloads state swaps the memory under its tensors, and begins with the large ones: looking at those tells.
        largest = sorted(entries, key=lambda e: e.param.numel(), reverse=True)[:SAMPLE]
        self._sample = [e.stored[name] for e in largest for name in stored]
        self._places = list(map(Tensor.data_ptr, self._sample))
        self.batch = Batch(columns, [], [], dense=lane.key.dense)
        self._scalars = () in self._strides
        self._contiguous = all(map(Tensor.is_contiguous, self.params))
        self._base: list[float] | None = None
        self._pairs: list[tuple[int, float]] = []
        # torch checks an assigned gradient's dtype itself, unless a parameter allows any (torch 2.10's grad_dtype=None)
        self._any_dtype = any(getattr(p, "grad_dtype", p.dtype) is None for p in self.params)

    def collect(self) -> bool:
        """Read this step's gradients; False if anything moved so that the plan must be made anew."""
        grads = list(map(_grad, self.params))
        try:
            if self._contiguous:  # the usual case, and a third of the time
                alike = all(map(Tensor.is_contiguous, grads))
            else:
                alike = list(map(Tensor.stride, grads)) == self._strides
            moved = (
                list(map(Tensor.data_ptr, self.params)) != self._pointers
                or list(map(Tensor.data_ptr, self._sample)) != self._places
            )
        except (RuntimeError, TypeError):  # a sparse gradient has no layout, a missing one nothing at all
            return False
        if moved or (self._any_dtype and not all(g.dtype == self.lane.key.grad for g in grads)):
            return False
        if not alike or self._scalars:
            grads = [like(g, p) for g, p in zip(grads, self.params, strict=True)]
        self.batch.tensors["grad"][:] = grads
        return True

    def rows(self, base: list[float], start: int, ahead: int) -> list[tuple[int, float]]:
        """Give each parameter its scalar row; return the (group, step) of each row.

        Args:
            base: the step counts of all active parameters, the same list while they advance together.
            start: where this lane's begin.
            ahead: what to add to them.
        """
        self.batch.sums.clear()
        self.batch.model.clear()
        if self._base is not base:
            index: dict[tuple[int, float], int] = {}
            pairs = zip((e.group for e in self.entries), base[start:], strict=False)
            self.batch.rows = [index.setdefault(pair, len(index)) for pair in pairs]
            self._base, self._pairs = base, list(index)
        for name in self._noise:
            steps = base[start:]
            self.batch.keys[name] = [noise_key(e.identity, name, int(steps[i]) + ahead) for i, e in enumerate(self.entries)]
        return [(group, count + ahead) for group, count in self._pairs]


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
    """The stored tensors that ``state`` lacks, in the parameter's own memory order."""
    codec, dtype = lane.key.recipe.codec, compute_dtype(p.dtype)
    missing: dict[str, Tensor] = {}
    for slot, fill in lane.slots.items():
        parts = codec.parts(slot, dtype)
        if all(name in state for name in parts):
            continue
        blank = {name: torch.zeros_like(p, dtype=d, requires_grad=False) for name, d in parts.items()}
        missing.update(codec.write(blank, slot, torch.full_like(p, fill, dtype=dtype)) if fill else blank)
    for name, stored in lane.dtypes.items():  # what param_ecc keeps beside a parameter: nothing to correct yet
        if name not in ("param", "grad") and not name.startswith(NOISE) and name not in state and name not in missing:
            missing[name] = torch.zeros_like(p, dtype=stored, requires_grad=False)
    return missing


def by_lane(entries: Iterable[Entry]) -> list[Work]:
    """Sort entries into one :class:`Work` for each lane, in order of appearance."""
    lanes: dict[Lane, list[Entry]] = {}
    for e in entries:
        lanes.setdefault(e.lane, []).append(e)
    return [Work(lane, members) for lane, members in lanes.items()]
