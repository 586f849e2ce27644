"""Which codec stores a slot: the one of ``ecc=``, or of its entry for this slot, if the slot is made for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import OptionError
from hbcore.rules.transform import Slot
from hbcore.state.blocks import block_shape
from hbcore.state.codec import BlockCodec, Cast, Fixed, StateCodec


@dataclass(frozen=True)
class PerSlot:
    """Another codec for each slot: ``ecc={"exp_avg": "int8"}``. Slots that are not named are stored as they are.

    Args:
        codecs: slot -> its codec.
        name: ``"exp_avg=int8,exp_avg_sq=uint8"``, as checkpoints record it.
    """

    codecs: Mapping[str, StateCodec]
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", ",".join(f"{slot}={codec.name}" for slot, codec in sorted(self.codecs.items())))

    def __hash__(self) -> int:
        return hash(self.name)

    def at(self, slot: str) -> StateCodec:
        """The codec of ``slot``, which may be a run's: ``"Q_0@1"``."""
        return self.codecs.get(slot.partition("@")[0], Cast())

    @property
    def rounds(self) -> bool:
        return any(codec.rounds for codec in self.codecs.values())

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return self.at(slot).parts(slot, dtype)

    def read(self, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype) -> Tensor:
        return self.at(slot).read(stored, slot, dtype)

    def write(self, stored: Mapping[str, Tensor], slot: str, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        return self.at(slot).write(stored, slot, value, noise)


def codec_of(name: str, slot: Slot, codec: StateCodec) -> StateCodec:
    """The codec that stores the slot called ``name`` in an optimizer with codec ``codec``.

    Raises:
        OptionError: the codec is for other slots.
    """
    if slot.dtype is not None:
        return Fixed(slot.dtype)
    if slot.exact:
        return Cast()
    chosen = codec.at(name) if isinstance(codec, PerSlot) else codec
    of: Any = getattr(chosen, "of", None)
    if of is None:
        return chosen
    try:
        found: StateCodec = of(slot)
    except OptionError as error:
        raise OptionError(f"ecc={chosen.name!r} does not store the slot {name!r}: {error}") from None
    return found


def fitting(codec: StateCodec, shape: torch.Size, by_rows: bool = True) -> StateCodec:
    """``codec``, or what takes its place for a tensor that is not made of blocks: there, blockwise codecs store plainly.

    Args:
        codec: an optimizer's.
        shape: the tensor's.
        by_rows: whether its memory is row by row.
    """
    if by_rows and block_shape(shape) is not None:
        return codec
    if isinstance(codec, PerSlot):
        return PerSlot({slot: Cast() if per_block_of(c) else c for slot, c in codec.codecs.items()})
    return Cast() if per_block_of(codec) else codec


def per_block_of(codec: StateCodec, slot: str = "slot") -> frozenset[str]:
    """The stored tensors of ``slot`` that have one entry for each block."""
    if isinstance(codec, PerSlot):
        codec = codec.at(slot)
    return codec.per_block(slot) if isinstance(codec, BlockCodec) else frozenset()


def noise_bits(codec: StateCodec) -> int:
    """How many random bits an element's stochastic rounding takes."""
    return int(getattr(codec, "noise_bits", 16))


def part_shape(codec: StateCodec, slot: str, part: str, shape: torch.Size) -> torch.Size:
    """The shape of one of a slot's stored tensors, for a slot of ``shape``."""
    if part not in per_block_of(codec, slot):
        return shape
    blocks = block_shape(shape)
    assert blocks is not None, "a blockwise codec was chosen for a slot without blocks"
    return blocks
