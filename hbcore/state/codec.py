"""How logical slots are stored. The codec alone determines the bytes of a state tensor.

``read`` and ``write`` are pure elementwise functions, so they trace into the same kernel as the rule: compressing a slot
costs no extra pass over memory. The engine copies the result of ``write`` into the stored tensors; nothing else mutates them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hbcore.errors import OptionError
from hbcore.rules.noise import stochastic_round_bf16, stochastic_round_fp16

ROUNDED = {torch.bfloat16: stochastic_round_bf16, torch.float16: stochastic_round_fp16}
"""The dtypes that are rounded to stochastically, given noise, and how."""


@runtime_checkable
class StateCodec(Protocol):
    """Stores each slot of a parameter as one or more tensors of the parameter's shape.

    A codec may also have

    * ``noise_bits``, the number of random bits that ``write`` uses of its noise, at most 16, the default;
    * ``of(slot)``, which returns the codec for a slot, a relative perhaps, or raises :class:`hbcore.errors.OptionError`;
    * ``caveat``, a sentence without its full stop on the values that it cannot store: with it, ``ecc=`` issues a StateWarning.
    """

    @property
    def name(self) -> str:
        """The name that checkpoints record: ``"plain"``, ``"cast:bfloat16"``, ``"bf16+8"``."""

    @property
    def rounds(self) -> bool:
        """Whether ``write`` can round stochastically, given noise."""

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The stored tensors of ``slot`` and their dtypes, for a logical value of ``dtype``: ``{"exp_avg": bfloat16, ...}``."""

    def read(self, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype) -> Tensor:
        """The logical value of ``slot`` in ``dtype``."""

    def write(self, stored: Mapping[str, Tensor], slot: str, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The new stored tensors of ``slot``; ``stored`` has the old ones.

        ``noise`` is int32, of the slot's shape, uniform in [0, 2^noise_bits): with it, rounding is stochastic.
        """


@runtime_checkable
class BlockCodec(StateCodec, Protocol):
    """A codec that stores some numbers once for every block of 32 elements, see :mod:`hbcore.state.blocks`.

    A slot whose rows are not made of blocks, or whose memory is not row by row, is stored plain instead.
    """

    def per_block(self, slot: str) -> frozenset[str]:
        """Those of the slot's :meth:`parts` that have one entry for each block, of the shape ``block_shape(slot's shape)``."""


@dataclass(frozen=True)
class Cast:
    """One tensor per slot, of ``storage`` dtype; float64 parameters always keep float64 state."""

    storage: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return "plain" if self.storage == torch.float32 else f"cast:{str(self.storage).removeprefix('torch.')}"

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {slot: torch.float64 if dtype == torch.float64 else self.storage}

    def read(self, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype) -> Tensor:
        return stored[slot].to(dtype)

    @property
    def rounds(self) -> bool:
        return self.storage in ROUNDED

    def write(self, stored: Mapping[str, Tensor], slot: str, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        return {slot: narrowed(value, stored[slot].dtype, noise)}


@dataclass(frozen=True)
class Fixed(Cast):
    """One tensor of ``storage`` dtype, of float64 parameters too: what a slot with a dtype of its own asks for."""

    @property
    def rounds(self) -> bool:
        return self.storage == torch.bfloat16

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {slot: self.storage}


def narrowed(value: Tensor, dtype: torch.dtype, noise: Tensor | None) -> Tensor:
    """``value`` in ``dtype``; rounded stochastically if ``dtype`` is bfloat16 or float16, and noise is given."""
    if noise is None or dtype not in ROUNDED:
        return value.to(dtype)
    return ROUNDED[dtype](value.to(torch.float32), noise)


def cast_codec(storage: str | torch.dtype) -> Cast:
    """The codec for ``storage_dtype=``.

    Raises:
        OptionError: ``storage`` is not a floating dtype.
    """
    dtype = getattr(torch, storage, None) if isinstance(storage, str) else storage
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise OptionError(f"storage_dtype={storage!r} is not a floating dtype; pass 'float32', 'bfloat16' or 'float16'.")
    return Cast(dtype)


def part_name(name: str, k: int, runs: int) -> str:
    """The state key of a slot for run ``k`` of a parameter that a matrix rule cuts into ``runs``."""
    return name if runs == 1 else f"{name}@{k}"
