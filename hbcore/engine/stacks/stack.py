"""Slabs: equally shaped blocks of many parameters in one stack, for rules that see whole matrices.

A lane writes each parameter's update straight into the slab's rows, the rule runs over all rows at once, and the next lane
reads them there, so stacking costs nothing. What the rule remembers lies in slabs too, and ``state[p][name]`` is a view of
the parameter's rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hbcore.distributed.exchange import Parcel
from hbcore.distributed.placement import Shards
from hbcore.engine.graph.segment_spec import Recipe
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Slot, Transform
from hbcore.rules.views import Block
from hbcore.state.codec import codec_of, part_name

LENT = ("cuda",)
"""Kinds of device on which a slab has memory for its inputs during a step alone. torch keeps what is given back there, for the
model's own use between steps; a CPU's would come back from the system page by page."""


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
        self._places = list(map(Tensor.data_ptr, self.inputs.values()))
        self.stored: dict[str, Tensor] = {}
        for name, slot in self.slots.items():
            self.stored.update(self._blank(name, slot, rows))

    def open(self) -> bool:
        """Take memory for the inputs, which hold anything then; say whether it lies elsewhere than in the last step."""
        if self.key.device.type in LENT:
            for t in self.inputs.values():
                t.untyped_storage().resize_(t.numel() * t.element_size())
        before, self._places = self._places, list(map(Tensor.data_ptr, self.inputs.values()))
        return self._places != before

    def close(self) -> None:
        """Give the memory back; views of the inputs stay, and have some again when the slab opens."""
        if self.key.device.type in LENT:
            for t in self.inputs.values():
                t.untyped_storage().resize_(0)

    def _blank(self, name: str, slot: Slot, rows: int) -> dict[str, Tensor]:
        codec, dtype = codec_of(slot, self.key.recipe.codec), compute_dtype(self.key.dtype)
        shape, device = (rows, *slot.shape), self.key.device
        blank = {part: torch.zeros(shape, dtype=d, device=device) for part, d in codec.parts(name, dtype).items()}
        filled = torch.full(shape, slot.fill, dtype=dtype, device=device) if slot.fill else None
        return blank if filled is None else codec.write(blank, name, filled)


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


def _run(whole: Tensor, block: Block) -> Tensor:
    return whole.view(-1)[block.start : block.start + block.numel]
