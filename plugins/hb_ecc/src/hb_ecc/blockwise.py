r"""State in one byte an element: the square root of its share of the block's largest magnitude, as a whole number.

With :math:`s` the largest magnitude of a block of 32 elements, and :math:`T` the largest code, 127 with a sign and 255 without:

.. math::
    q = \mathrm{sign}(x) \max\left(1, \mathrm{round}\left(T \sqrt{|x| / s}\right)\right), \quad q = 0 \text{ if } x = 0
    \qquad
    x \approx q |q| \, s / T^2

The root is off by at most half a step, :math:`\sqrt{s} / 2T`, and by at most a whole one where :math:`|x|` is below
:math:`s / 4 T^2` and would be 0: **what is not zero is never stored as zero**, as a second moment of 0 beside a first that is
not would make steps a thousand times too long. The root gives small elements of a block more codes, and is what an optimizer
divides by. The block's largest magnitude comes back as it is.

The scale is a float32, which costs an eighth of a byte an element, and not a bfloat16, which costs half of that: rounded to
eight bits, it cannot follow an average that decays by less than 2^-9 a step, as second moments with a beta2 from 0.998 on do.
After gradients have become ten times smaller, the root of such a moment would stay 7.7 times too large, for ever.

No backend may find another code than the others. The square root of a machine may be off by a bit; :func:`root` finds out from
the squares of its neighbours, which are exact, which number is nearest. Products here are not added to anything, so that no
fused multiply-add changes them.

* A block of zeros has the scale 0.
* The scale of other blocks is at least 2^-100: in a block of magnitudes below 7.9e-31, the steps are those of a block of that.
* If one element of a block is inf or NaN, the scale is, and every element that is not zero reads inf or NaN; zeros read NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hbcore.api import OptionError, Slot, StateCodec, block_amax, spread

SMALLEST_SCALE = 2.0**-100
"""With it, neither its inverse overflows nor its share of 1 / 255^2 underflows."""


@dataclass(frozen=True)
class Blockwise:
    """A slot as codes of a byte, under its own name, and as float32 scales, ``"<slot>#scale"``, one for 32 elements.

    A zero-filled slot is zero. float64 parameters keep float64 state and no scales.
    """

    name: ClassVar[str]
    codes: ClassVar[torch.dtype]
    largest: ClassVar[int]
    rounds: ClassVar[bool] = False

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The stored tensors of ``slot`` and their dtypes, for a logical value of ``dtype``."""
        if dtype == torch.float64:
            return {slot: torch.float64}
        return {slot: self.codes, f"{slot}#scale": torch.float32}

    def per_block(self, slot: str) -> frozenset[str]:
        """The scales."""
        return frozenset({f"{slot}#scale"})

    def read(self, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype) -> Tensor:
        """The logical value of ``slot`` in ``dtype``."""
        codes = stored[slot]
        if codes.dtype == torch.float64:
            return codes.to(dtype)
        share = self.square(codes.to(torch.float32)) * (1 / self.largest**2)  # 1 for the largest code, exactly
        return (share * spread(stored[f"{slot}#scale"], codes)).to(dtype)

    def write(self, stored: Mapping[str, Tensor], slot: str, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The new stored tensors of ``slot``, to nearest."""
        if stored[slot].dtype == torch.float64:
            return {slot: value.to(torch.float64)}
        value = value.to(torch.float32)
        magnitude = value.abs()
        highest = block_amax(magnitude)
        scale = torch.clamp(highest, min=SMALLEST_SCALE)
        squares = magnitude * spread(self.largest**2 / scale, magnitude)
        # of NaN, a code that all backends agree on
        code = torch.where(squares <= self.largest**2, root(squares), self.largest)
        code = torch.where((code < 1) & (magnitude > 0), 1.0, code)
        return {
            slot: self.signed(code, value).to(self.codes),
            f"{slot}#scale": torch.where(highest == 0, highest, scale),
        }

    @staticmethod
    def square(code: Tensor) -> Tensor:
        """The square of a code, with its sign."""
        raise NotImplementedError

    @staticmethod
    def signed(code: Tensor, value: Tensor) -> Tensor:
        """A code without a sign with that of ``value``, if the codec has signs."""
        raise NotImplementedError


class UInt8(Blockwise):
    """``"uint8"``: 1.125 bytes an element, for state that is never negative; the root is off by sqrt(scale) / 510 at most.

    Where the code would be 0, it is 1 instead, and the root is off by up to sqrt(scale) / 255.
    """

    name = "uint8"
    codes = torch.uint8
    largest = 255

    def of(self, slot: Slot) -> StateCodec:
        """This codec.

        Raises:
            OptionError: the slot may be negative.
        """
        if not slot.nonnegative:
            raise OptionError(
                f"ecc='uint8' stores no signs, and a slot of shape {list(slot.shape)} may be negative; pass ecc='int8', which "
                "stores slots that never are in the same way."
            )
        return self

    @staticmethod
    def square(code: Tensor) -> Tensor:
        return code * code

    @staticmethod
    def signed(code: Tensor, value: Tensor) -> Tensor:
        return code


class Int8(Blockwise):
    """``"int8"``: 1.125 bytes an element; the root of a magnitude is off by sqrt(scale) / 254 at most.

    Where the code would be 0, it is 1 instead, and the root is off by up to sqrt(scale) / 127. State that is never negative is
    stored as ``"uint8"`` does, twice as finely.
    """

    name = "int8"
    codes = torch.int8
    largest = 127

    def of(self, slot: Slot) -> StateCodec:
        """The codec of a slot: ``"uint8"`` for one that is never negative."""
        return UInt8() if slot.nonnegative else self

    @staticmethod
    def square(code: Tensor) -> Tensor:
        return code * code.abs()

    @staticmethod
    def signed(code: Tensor, value: Tensor) -> Tensor:
        return torch.where(value < 0, -code, code)


def root(squares: Tensor) -> Tensor:
    """The whole numbers nearest to the square roots of numbers from 0 to 2^16, halves upwards: the same on every machine.

    ``x`` is nearest to the root of ``w`` if ``(x - 1/2)^2 <= w < (x + 1/2)^2``. float32 holds these squares exactly, and a
    square root that is off by a few bits is off by one at most after rounding.
    """
    near = torch.round(torch.sqrt(squares))
    above, below = near + 0.5, near - 0.5
    near = torch.where(squares >= above * above, near + 1.0, near)
    return torch.where(squares < below * below.abs(), near - 1.0, near)
