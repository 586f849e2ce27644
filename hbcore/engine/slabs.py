"""Slabs: equally shaped blocks of many parameters in one stack, for rules that see whole matrices.

A lane writes each parameter's update straight into the slab's rows, the rule runs over all rows at once, and the next lane
reads them there, so stacking costs nothing. What the rule remembers lies in slabs too, and ``state[p][name]`` is a view of
the parameter's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.exchange import Parcel
from hbcore.distributed.placement import Shards
from hbcore.engine.recipe import Recipe
from hbcore.errors import RuleError
from hbcore.rules.division import Divide
from hbcore.rules.noise import bits, normal, uniform
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Context, Slot, State, Transform
from hbcore.rules.views import Block
from hbcore.state.codec import codec_of, part_name


@dataclass(frozen=True)
class SlabKey:
    """What blocks must share to lie in one slab."""

    recipe: Recipe
    group: int
    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Slab:
    """The blocks of some parameters, row by row.

    Attributes:
        names: what each row's random numbers are drawn by.
        inputs: what the lane before writes: ``update``, and what else the rule needs. The rule's result replaces ``update``.
        stored: the slots as the codec stores them, ``[rows, *slot.shape]`` each.
    """

    def __init__(self, key: SlabKey, rule: Transform, feeds: Mapping[str, torch.dtype], names: list[str]) -> None:
        self.key, self.names = key, names
        self.slots = rule.slots(torch.empty(key.shape, dtype=key.dtype, device="meta"))
        rows = len(names)
        self.inputs = {n: torch.zeros(rows, *key.shape, dtype=d, device=key.device) for n, d in feeds.items()}
        self.stored: dict[str, Tensor] = {}
        for name, slot in self.slots.items():
            self.stored.update(self._blank(name, slot, rows))

    def _blank(self, name: str, slot: Slot, rows: int) -> dict[str, Tensor]:
        codec, dtype = codec_of(slot, self.key.recipe.codec), compute_dtype(self.key.dtype)
        shape, device = (rows, *slot.shape), self.key.device
        blank = {part: torch.zeros(shape, dtype=d, device=device) for part, d in codec.parts(name, dtype).items()}
        filled = torch.full(shape, slot.fill, dtype=dtype, device=device) if slot.fill else None
        return blank if filled is None else codec.write(blank, name, filled)

    def run(self, turn: Turn) -> dict[str, Tensor]:
        """Run the rule over some of the rows, in place; return the new values of what the group carries."""
        rows, rule = turn.rows, turn.rule
        stored = self.stored if rows is None else {name: t[rows] for name, t in self.stored.items()}
        inputs = self.inputs if rows is None else {name: t[rows] for name, t in self.inputs.items()}
        state = SlabState(stored, self.slots, self.key, turn.carried)
        context = self._context(turn, inputs, state)
        with exact_products():
            if turn.priming:
                new = rule.prime(inputs["update"], state, context)
            else:
                update, new = rule.update(inputs["update"], state, context)
        given = {t.untyped_storage().data_ptr() for t in (*inputs.values(), *stored.values())}
        # what is a view of something that is written below is read before
        new = {n: v.clone() if v.untyped_storage().data_ptr() in given else v for n, v in new.items()}
        if not turn.priming:
            _put(self.inputs["update"], rows, update.clone() if update.untyped_storage().data_ptr() in given else update)
        carried = {name: value for name, value in new.items() if name in turn.carried}
        for name, value in new.items():
            if name not in carried:
                self._write(name, value, stored, turn)
        return carried

    def _write(self, name: str, value: Tensor, stored: Mapping[str, Tensor], turn: Turn) -> None:
        if name not in self.slots:
            raise RuleError(f"rule {turn.rule.name!r} returned {name!r}, which is none of its slots {sorted(self.slots)}.")
        slot = self.slots[name]
        noise = None
        if self.key.recipe.stochastic and not slot.exact and self.key.recipe.codec.rounds:
            noise = bits(turn.keys(f"round.{name}"), slot.shape.numel(), self.key.device).view(-1, *slot.shape)
        for part, kept in codec_of(slot, self.key.recipe.codec).write(stored, name, value, noise).items():
            _put(self.stored[part], turn.rows, kept)

    def _context(self, turn: Turn, inputs: Mapping[str, Tensor], state: State) -> Context:
        draws: list[int] = []

        def drawn(draw: Callable[..., Tensor], like: Tensor) -> Tensor:
            draws.append(1)
            keys = turn.keys(f"{turn.rule.name}.{len(draws)}")
            return draw(keys, like[0].numel(), like.device).view(like.shape).to(like.dtype)

        absent: Any = Absent(turn.rule.name)
        dims = tuple(range(1, len(self.key.shape) + 1))
        context = Context(
            param=inputs.get("param", absent),
            grad=inputs.get("grad", absent),
            step=turn.step,
            divide=turn.divide,
            sum=lambda x: x.sum(dims, keepdim=True) if dims else x,  # no dimensions would mean all of them
            amax=lambda x: x.amax(dims, keepdim=True) if dims else x,
            numel=torch.tensor(float(torch.Size(self.key.shape).numel()), dtype=torch.float64, device="cpu"),
            refresh=turn.refresh,
            probe=lambda like: drawn(normal, like),
            noise=lambda like: drawn(uniform, like),
        )
        return context._replace(apply=lambda inner, u, s: inner.update(u, s, context))


@dataclass
class Turn:
    """One run of a rule over rows of a slab that have the same step.

    Attributes:
        rows: which of the slab's rows; None for all of them.
        names: those rows' names.
        step: their step, 0-d float64 on the host.
        carried: what the group carries, 0-d float64 each.
    """

    rule: Transform
    rows: Tensor | None
    names: list[str]
    step: Tensor
    refresh: bool
    priming: bool
    divide: Divide
    carried: Mapping[str, Tensor]
    key_of: Callable[[str, str, int], int]

    def keys(self, what: str) -> Tensor:
        """A key for each row, int64."""
        return torch.tensor([self.key_of(name, what, int(self.step)) for name in self.names], dtype=torch.int64)


class SlabState(Mapping[str, Tensor]):
    """A rule's slots as it sees them: decoded when they are asked for, and not before."""

    def __init__(
        self, stored: Mapping[str, Tensor], slots: Mapping[str, Slot], key: SlabKey, carried: Mapping[str, Tensor]
    ) -> None:
        self._stored, self._slots, self._key, self._carried = stored, slots, key, carried

    def __getitem__(self, name: str) -> Tensor:
        if name in self._carried:
            return self._carried[name]
        codec = codec_of(self._slots[name], self._key.recipe.codec)
        return codec.read(self._stored, name, compute_dtype(self._key.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter((*self._slots, *self._carried))

    def __len__(self) -> int:
        return len(self._slots) + len(self._carried)


class Absent:
    """Stands in for a part of the context that the rule did not ask for."""

    def __init__(self, rule: str) -> None:
        self._rule = rule

    def __getattr__(self, name: str) -> Any:
        raise RuleError(f"rule {self._rule!r} reads c.param or c.grad; say so with needs = frozenset({{'param', 'grad'}}).")


@dataclass(eq=False)
class Seat:
    """Where one matrix rule sees a parameter: for each run of blocks, the slab and its first row there.

    Attributes:
        shape: the parameter's.
        places: ``(block, slab, first row)``.
        scratch: what the lanes write and read if the blocks lie in several slabs; empty if they lie in one.
    """

    shape: torch.Size
    places: list[tuple[Block, Slab, int]]
    scratch: dict[str, Tensor] = field(default_factory=dict)

    def column(self, name: str) -> Tensor:
        """What the lanes see of the slabs' input ``name``: a tensor of the parameter's shape."""
        if len(self.places) == 1:
            [(block, slab, row)] = self.places
            return slab.inputs[name][row : row + block.batch].view(self.shape)
        if name not in self.scratch:
            like = self.places[0][1].inputs[name]
            self.scratch[name] = torch.zeros(self.shape, dtype=like.dtype, device=like.device)
        return self.scratch[name]

    def deal(self) -> None:
        """Bring what a lane wrote to the slabs, where it did not write there itself."""
        for name, whole in self.scratch.items():
            for block, slab, row in self.places:
                slab.inputs[name][row : row + block.batch].view(-1).copy_(_run(whole, block))

    def collect(self) -> None:
        """Bring the slabs' results to where the next lane reads them."""
        if "update" in self.scratch:
            for block, slab, row in self.places:
                _run(self.scratch["update"], block).copy_(slab.inputs["update"][row : row + block.batch].view(-1))

    def state(self) -> dict[str, Tensor]:
        """The parameter's own state tensors: views of slab rows, numbered by run where there are several."""
        views: dict[str, Tensor] = {}
        for k, (block, slab, row) in enumerate(self.places):
            for name, stored in slab.stored.items():
                view = stored[row] if block.batch == 1 else stored[row : row + block.batch]
                views[part_name(name, k, len(self.places))] = view
        return views


@dataclass(eq=False)
class SpreadSeat:
    """Where one matrix rule sees a parameter that is spread over ranks: whole, on its owner.

    Attributes:
        shards: how it is spread.
        owner: the rank that runs the rule on it.
        inner: the seat on the owner; one without places elsewhere.
        part: this rank's part of the parameter.
        feeds: what the rule reads, and in which dtypes.
    """

    shards: Shards
    owner: int
    inner: Seat
    part: Tensor
    feeds: Mapping[str, torch.dtype]
    scratch: dict[str, Tensor] = field(default_factory=dict)

    @property
    def places(self) -> list[tuple[Block, Slab, int]]:
        """As of a seat; none on ranks that do not own the parameter."""
        return self.inner.places

    def column(self, name: str) -> Tensor:
        """What the lanes see: a tensor of the shape of this rank's part."""
        if name not in self.scratch:
            self.scratch[name] = torch.zeros_like(self.part, dtype=self.feeds[name], requires_grad=False)
        return self.scratch[name]

    def parcel(self, name: str) -> Parcel:
        """One of the rule's inputs, or its result, on its way between ranks and owner."""
        whole = self.inner.column(name).view(-1) if self.inner.places else None
        return Parcel(self.column(name).view(-1), whole, self.owner, self.shards.sizes())

    def state(self) -> dict[str, Tensor]:
        """As of a seat."""
        return self.inner.state()


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the model asked torch for: TF32 would spoil a basis."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _run(whole: Tensor, block: Block) -> Tensor:
    return whole.view(-1)[block.start : block.start + block.numel]


def _put(target: Tensor, rows: Tensor | None, value: Tensor) -> None:
    if rows is None:
        target.copy_(value)
    else:
        target[rows] = value.to(target.dtype)
