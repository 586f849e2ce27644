"""A lane: the parameters that one program updates, and what of them takes part in a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.backend import Batch, Executable
from hbcore.engine.program import Program
from hbcore.engine.recipe import Recipe, compute_dtype

Group = dict[str, Any]

_grad, _dtype = attrgetter("grad"), attrgetter("dtype")


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
        label: the chain in words.
    """

    key: LaneKey
    slots: dict[str, float]
    dtypes: dict[str, torch.dtype]
    label: str
    program: Program | None = None
    executable: Executable | None = None
    backend: str = ""

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
    counter: tuple[int, int]
    state: dict[str, Any]
    stored: dict[str, Tensor] = field(default_factory=dict)


class Work:
    """The parameters of one lane that have a gradient, with their columns laid out; kept while nothing moves."""

    def __init__(self, lane: Lane, entries: list[Entry]) -> None:
        self.lane, self.entries = lane, entries
        self.params = [e.param for e in entries]
        self.counters = [e.counter for e in entries]
        self._states = [e.state for e in entries]
        self._pointers = list(map(Tensor.data_ptr, self.params))
        self._strides = list(map(Tensor.stride, self.params))
        columns: dict[str, list[Tensor]] = {"param": [p.detach() for p in self.params], "grad": []}
        columns.update({name: [e.stored[name] for e in entries] for name in lane.dtypes if name not in columns})
        self.batch = Batch(columns, [], [])
        self.groups = sorted({e.group for e in entries})
        self._group_rows = [self.groups.index(e.group) for e in entries]

    def collect(self) -> bool:
        """Read this step's gradients; False if anything moved so that the plan must be made anew."""
        grads = list(map(_grad, self.params))
        if any(map(is_, grads, repeat(None))) or not all(map(is_, map(_dtype, grads), repeat(self.lane.key.grad))):
            return False
        if any(g.layout is not torch.strided for g in grads) or list(map(Tensor.data_ptr, self.params)) != self._pointers:
            return False
        for name in ("step", *self.batch.tensors):
            column = [e.stored["step"] for e in self.entries] if name == "step" else self.batch.tensors[name]
            if name not in ("param", "grad") and not all(map(is_, map(dict.get, self._states, repeat(name)), column)):
                return False
        strides = list(map(Tensor.stride, grads))
        if strides != self._strides:
            grads = [like(g, p) for g, p in zip(grads, self.params, strict=True)]
        self.batch.tensors["grad"][:] = grads
        return True

    def rows(self, counts: list[float]) -> list[tuple[int, float]]:
        """Give each parameter its scalar row; return the (group, step) of each row."""
        self.batch.sums.clear()
        self.batch.model.clear()
        if counts.count(counts[0]) == len(counts):
            self.batch.rows = self._group_rows
            return [(g, counts[0]) for g in self.groups]
        index: dict[tuple[int, float], int] = {}
        self.batch.rows = [
            index.setdefault((e.group, count), len(index)) for e, count in zip(self.entries, counts, strict=True)
        ]
        return list(index)


def like(grad: Tensor, param: Tensor) -> Tensor:
    """``grad`` in the memory order of ``param``: itself, or a copy where they differ."""
    if grad.stride() == param.stride() or param.numel() == 1:
        return grad.detach()
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)


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
    return missing


def numbers(recipe: Recipe, group: Group) -> list[float]:
    """The group's present hyperparameters, flattened as in ``recipe.scalar_names``, without step and model size."""
    flat: list[float] = []
    for key, n in recipe.dynamic:
        value = group[key]
        flat += [float(value)] if n is None else [float(v) for v in value]
    return flat


def by_lane(entries: Iterable[Entry]) -> list[Work]:
    """Sort entries into one :class:`Work` for each lane, in order of appearance."""
    lanes: dict[Lane, list[Entry]] = {}
    for e in entries:
        lanes.setdefault(e.lane, []).append(e)
    return [Work(lane, members) for lane, members in lanes.items()]
