r"""State in one byte an element: the square root of its magnitude as a whole number, in units that 32 neighbours share.

With :math:`h` the largest magnitude of a block of 32 elements, and :math:`T` the largest code, 127 with a sign and 255 without:

.. math::
    s = h / T^2 \qquad
    q = \mathrm{sign}(x)\, n \quad\text{for}\quad n (n - 1) < |x| / s \le n (n + 1) \qquad
    x \approx q |q| \, s

The scale :math:`s` is the magnitude of code 1. :math:`n` is the whole number nearest to :math:`\sqrt{|x| / s}`, but for what
would be 0 and is not: **what is not zero is never stored as zero**, as a second moment of 0 beside a first that is not would
make steps a thousand times too long. So the root is off by half a step, by 0.59 between codes 1 and 2, and by a whole one below
code 1. The root gives small elements of a block more codes, and is what an optimizer divides by.

Scales of what is never negative are float32, which costs an eighth of a byte an element: rounded to the eight bits of a
bfloat16, they could not follow an average that decays by less than 2^-9 a step, as second moments with a beta2 from 0.998 on
do. After gradients have become ten times smaller, the root of such a moment would stay 7.7 times too large, for ever. First
moments decay faster, and theirs are bfloat16, rounded up, so that no code is beyond T.

No backend may find another code than the others: :func:`hbcore.api.root_code` finds it without trusting a square root. Products
here are not added to anything, so that no fused multiply-add changes them.

* A block of zeros has the scale 0.
* The scale of other blocks is at least 2^-114.
* What is less than 2^-149 of the scale is stored as zero after all.
* If an element of a block is inf, the scale is, infinities read inf, and the others NaN. If one is NaN, all read NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hbcore.api import OptionError, Slot, StateCodec, block_amax, root_code, spread

SMALLEST_SCALE = 2.0**-114
"""Its inverse does not overflow, nor does that of any other scale underflow."""


@dataclass(frozen=True)
class Blockwise:
    """A slot as codes of a byte, under its own name, and as scales, ``"<slot>#scale"``, one for 32 elements.

    A zero-filled slot is zero. float64 parameters keep float64 state and no scales.
    """

    name: ClassVar[str]
    codes: ClassVar[torch.dtype]
    scales: ClassVar[torch.dtype]
    largest: ClassVar[int]
    largest_scale: ClassVar[float]
    rounds: ClassVar[bool] = False

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The stored tensors of ``slot`` and their dtypes, for a logical value of ``dtype``."""
        if dtype == torch.float64:
            return {slot: torch.float64}
        return {slot: self.codes, f"{slot}#scale": self.scales}

    def per_block(self, slot: str) -> frozenset[str]:
        """The scales."""
        return frozenset({f"{slot}#scale"})

    def read(self, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype) -> Tensor:
        """The logical value of ``slot`` in ``dtype``."""
        codes = stored[slot]
        if codes.dtype == torch.float64:
            return codes.to(dtype)
        scale = stored[f"{slot}#scale"].to(torch.float32)
        return (self.square(codes.to(torch.float32)) * spread(scale, codes)).to(dtype)

    def write(self, stored: Mapping[str, Tensor], slot: str, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The new stored tensors of ``slot``, to nearest."""
        if stored[slot].dtype == torch.float64:
            return {slot: value.to(torch.float64)}
        value = value.to(torch.float32)
        magnitude = value.abs()
        highest = block_amax(magnitude.view(torch.int32)).view(torch.float32)  # on bits, NaN is above inf
        scale = torch.clamp(highest / self.largest**2, min=SMALLEST_SCALE)
        within = torch.where(scale < math.inf, self.largest_scale, scale)  # what is finite comes back finite
        scale = torch.where(scale <= self.largest_scale, self.rounded(scale), within)
        code = root_code(magnitude * spread(1 / scale, magnitude), self.largest)
        return {
            slot: self.signed(code, value).to(self.codes),
            f"{slot}#scale": torch.where(highest == 0, highest, scale).to(self.scales),
        }

    @staticmethod
    def square(code: Tensor) -> Tensor:
        """The square of a code, with its sign."""
        raise NotImplementedError

    @staticmethod
    def signed(code: Tensor, value: Tensor) -> Tensor:
        """A code without a sign with that of ``value``, if the codec has signs."""
        raise NotImplementedError

    @staticmethod
    def rounded(scale: Tensor) -> Tensor:
        """A scale up to :attr:`largest_scale` as it is stored, in float32; of others, any number."""
        raise NotImplementedError


class UInt8(Blockwise):
    """``"uint8"``: 1.125 bytes an element, for state that is never negative; roots are off by 1 / 510 of the block's largest.

    Between codes 1 and 2 they are off by 1 / 435, and by up to 1 / 255 below code 1.
    """

    name = "uint8"
    codes = torch.uint8
    scales = torch.float32
    largest = 255
    largest_scale = float.fromhex("0x1.0203020000000p+112")  # the largest float32 of which 255^2 are finite

    def of(self, slot: Slot) -> StateCodec:
        """This codec.

        Raises:
            OptionError: the slot may be negative.
        """
        if not slot.nonnegative:
            raise OptionError(
                "it may be negative, and the codec stores no signs; pass ecc='int8', which stores slots that never are in the "
                "same way."
            )
        return self

    @staticmethod
    def square(code: Tensor) -> Tensor:
        return code * code

    @staticmethod
    def signed(code: Tensor, value: Tensor) -> Tensor:
        return code

    @staticmethod
    def rounded(scale: Tensor) -> Tensor:
        return scale


class Int8(Blockwise):
    """``"int8"``: 1.0625 bytes an element; roots of magnitudes are off by 1 / 253 of the block's largest.

    Between codes 1 and 2 they are off by 1 / 216, and by up to 1 / 126 below code 1. State that is never negative is stored as
    ``"uint8"`` does, twice as finely. For averages that decay by a hundredth a step or more, as first moments do: what changes
    less from step to step than a code is wide does not change at all.
    """

    name = "int8"
    codes = torch.int8
    scales = torch.bfloat16
    largest = 127
    largest_scale = float.fromhex("0x1.0400000000000p+114")  # the largest bfloat16 of which 127^2 are finite

    def of(self, slot: Slot) -> StateCodec:
        """The codec of a slot: ``"uint8"`` for one that is never negative."""
        return UInt8() if slot.nonnegative else self

    @staticmethod
    def square(code: Tensor) -> Tensor:
        return code * code.abs()

    @staticmethod
    def signed(code: Tensor, value: Tensor) -> Tensor:
        return torch.where(value < 0, -code, code)

    @staticmethod
    def rounded(scale: Tensor) -> Tensor:
        return ((scale.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
