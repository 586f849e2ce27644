"""The storage codecs: state and parameters in three or four bytes that behave like float32.

Each is a class without constructor arguments; ``hbcore`` makes one for each optimizer. See :mod:`hb_ecc.ulp` for the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hb_ecc import ulp


@dataclass(frozen=True)
class Corrected:
    """A slot as bfloat16, under its own name, and as a correction, under ``"<slot>#ecc"``, both of the slot's shape.

    The bfloat16 alone is the stored value rounded to nearest, halves away from zero. With a correction of zero the value is
    exactly the bfloat16: a zero-filled slot is zero, and a bfloat16 parameter that gets a new correction keeps its value.
    float64 parameters keep float64 state and no correction.
    """

    name: ClassVar[str]
    correction: ClassVar[torch.dtype]
    rounds: ClassVar[bool]
    noise_bits: ClassVar[int] = 16

    @staticmethod
    def split(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """A float32 tensor as bfloat16 and correction; rounded stochastically if noise is given and the codec rounds."""
        raise NotImplementedError

    @staticmethod
    def join(hi: Tensor, lo: Tensor) -> Tensor:
        """The float32 tensor that bfloat16 and correction encode."""
        raise NotImplementedError

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The stored tensors of ``slot`` and their dtypes, for a logical value of ``dtype``."""
        if dtype == torch.float64:
            return {slot: torch.float64}
        return {slot: torch.bfloat16, f"{slot}#ecc": self.correction}

    def read(self, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype) -> Tensor:
        """The logical value of ``slot`` in ``dtype``."""
        if stored[slot].dtype == torch.float64:
            return stored[slot].to(dtype)
        return self.join(stored[slot], stored[f"{slot}#ecc"]).to(dtype)

    def write(self, stored: Mapping[str, Tensor], slot: str, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The new stored tensors of ``slot``; ``noise`` is int32, uniform in [0, 2^noise_bits)."""
        if stored[slot].dtype == torch.float64:
            return {slot: value.to(torch.float64)}
        hi, lo = self.split(value.to(torch.float32), noise)
        return {slot: hi, f"{slot}#ecc": lo}


class BF16Plus8(Corrected):
    """``"bf16+8"``: three bytes an element, 16 significant bits; the relative error of a write is at most 2^-16, 1.53e-5."""

    name = "bf16+8"
    correction = torch.int8
    rounds = True
    noise_bits = 8
    join = staticmethod(ulp.join24)

    @staticmethod
    def split(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        return ulp.split24(x, ulp.NEAREST if noise is None else noise)


class BF16Plus16(Corrected):
    """``"bf16+16"``: four bytes an element, float32 bit for bit, with a bfloat16 that other programs can read."""

    name = "bf16+16"
    correction = torch.int16
    rounds = False
    join = staticmethod(ulp.join32)

    @staticmethod
    def split(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        return ulp.split32(x)
