"""The codecs of a 16-bit float and a correction: state and parameters in three or four bytes that behave like float32.

Each is a class without constructor arguments; ``hbcore`` makes one for each optimizer. See :mod:`hb_ecc.ulp` and
:mod:`hb_ecc.half` for the bits, and :mod:`hb_ecc.blockwise` for state in one byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hb_ecc import half, ulp


@dataclass(frozen=True)
class Corrected:
    """A slot as a 16-bit float, under its own name, and as a correction, under ``"<slot>#ecc"``, both of the slot's shape.

    The float alone is the stored value rounded to nearest, halves away from zero. With a correction of zero the value is
    exactly that float: a zero-filled slot is zero, and a bfloat16 parameter that gets a new correction keeps its value.
    float64 parameters keep float64 state and no correction.
    """

    name: ClassVar[str]
    short: ClassVar[torch.dtype] = torch.bfloat16
    correction: ClassVar[torch.dtype]
    rounds: ClassVar[bool]
    noise_bits: ClassVar[int] = 16
    caveat: ClassVar[str | None] = None

    @staticmethod
    def split(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """A float32 tensor as short float and correction; rounded stochastically if noise is given and the codec rounds."""
        raise NotImplementedError

    @staticmethod
    def join(hi: Tensor, lo: Tensor) -> Tensor:
        """The float32 tensor that short float and correction encode."""
        raise NotImplementedError

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The stored tensors of ``slot`` and their dtypes, for a logical value of ``dtype``."""
        if dtype == torch.float64:
            return {slot: torch.float64}
        return {slot: self.short, f"{slot}#ecc": self.correction}

    def read(self, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype) -> Tensor:
        """The logical value of ``slot`` in ``dtype``."""
        if stored[slot].dtype == torch.float64:
            return stored[slot].to(dtype)
        return self.join(stored[slot], stored[f"{slot}#ecc"]).to(dtype)

    def write(self, stored: Mapping[str, Tensor], slot: str, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The new stored tensors of ``slot``; ``noise`` is int32, uniform in [0, 2^16).

        Its lowest :attr:`noise_bits` are used.
        """
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


class FP16Plus8(Corrected):
    """``"fp16+8"``: three bytes an element, 18 significant bits; the relative error of a write is at most 2^-19, 1.91e-6.

    That holds from 2^-14 to 65519.9; below, the error is at most 2^-33, and above, the value is stored as 65519.9.
    """

    name = "fp16+8"
    short = torch.float16
    correction = torch.int8
    rounds = True
    noise_bits = 5
    caveat = (
        "magnitudes below 2^-33 are stored as zero, so that the second moments of gradients below about 1e-5 are lost, and "
        "those beyond 65519.9 are stored as that; pass 'bf16+8' unless all moments are known to be in this range"
    )
    join = staticmethod(half.join_8)

    @staticmethod
    def split(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        return half.split_8(x, half.NEAREST if noise is None else noise & 0x1F)


class FP16Plus16(Corrected):
    """``"fp16+16"``: four bytes an element, float32 bit for bit from 2^-14 to 65519.99; below, the error is at most 2^-41.

    Above, the value is stored as 65519.99.
    """

    name = "fp16+16"
    short = torch.float16
    correction = torch.int16
    rounds = False
    caveat = (
        "magnitudes below 2^-41 are stored as zero, so that the second moments of gradients below about 1e-6 are lost, and "
        "those beyond 65519.99 are stored as that; pass 'bf16+16' unless all moments are known to be in this range"
    )
    join = staticmethod(half.join_16)

    @staticmethod
    def split(x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        return half.split_16(x)
