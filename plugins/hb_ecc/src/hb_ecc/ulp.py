"""A float32 as a bfloat16 and a signed correction, with integer arithmetic only.

A bfloat16 is the upper half of a float32. On their bits as integers, rounding to bfloat16 drops low bits, and the dropped part
is a small signed integer: the correction, in units of the last bit kept. No scale is stored and no exponent extracted,
and no compiler can optimise the round trip away, as it may ``x - bfloat16(x)``.

=========  ============================================  ======================  ==========================================
parts      encoding of ``bits``, a float32 as an int32   bytes                   comes back as
=========  ============================================  ======================  ==========================================
16 + 16    ``hi = (bits + 0x8000) >> 16``                2 + 2                   itself, bit for bit
           ``lo = bits - (hi << 16)``
16 + 8     ``b = (bits + 0x80) >> 8``                    2 + 1                   within 2^-16 of itself, relatively;
           ``hi = (b + 0x80) >> 8``                                              within 2^-142 below 2^-126
           ``lo = b - (hi << 8)``
=========  ============================================  ======================  ==========================================

A float is sign and magnitude, and its int32 is ``-2^31 + magnitude`` when the sign is set; shifting right floors, so both
signs round their magnitude alike, halves away from zero. The special values:

* ±0, ±inf and denormals are not special: they are integers like the others.
* NaN comes back as the quiet NaN ``0x7fc00000``; rounded like a number, one with a small payload would become inf.
* Values that would round up to inf in 24 bits (from ``0x7f7fff80``, 3.4027977e38, on) are truncated: finite stays finite.
* ``hi`` alone may read inf where the float32 is finite, from ``0x7f7f8000`` on, as rounding to bfloat16 always has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUIET_NAN = 0x7FC00000
NEAREST = 0x80
"""The dither that rounds eight bits to nearest."""

_MAGNITUDE = 0x7FFFFFFF
_NEAR_INF = 0x7F7FFF00
"""The last 256 magnitudes below inf: adding a dither of up to 255 to one of them may carry into inf."""


def split32(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (float32) as bfloat16 and int16, exactly: :func:`join32` returns ``x``."""
    bits = _bits(x)
    hi = (bits + 0x8000) >> 16
    lo = bits - (hi << 16)
    return hi.to(torch.int16).view(torch.bfloat16), lo.to(torch.int16)


def join32(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that :func:`split32` split."""
    upper = hi.view(torch.int16).to(torch.int32)
    return ((upper << 16) + _fitting(upper, lo)).view(torch.float32)


def split24(x: Tensor, dither: Tensor | int = NEAREST) -> tuple[Tensor, Tensor]:
    """``x`` (float32) rounded to 24 bits, as bfloat16 and int8.

    Args:
        x: any shape.
        dither: int32 in [0, 256), added before the low eight bits are cut off. The default rounds to nearest; eight uniform
            random bits round stochastically, up with a probability that is the fraction that is cut off.
    """
    bits = _bits(x)
    b = torch.where((bits & _MAGNITUDE) < _NEAR_INF, bits + dither, bits) >> 8
    hi = (b + 0x80) >> 8
    lo = b - (hi << 8)
    return hi.to(torch.int16).view(torch.bfloat16), lo.to(torch.int8)


def join24(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that :func:`split24` rounded to."""
    upper = hi.view(torch.int16).to(torch.int32)
    return (((upper << 8) + _fitting(upper, lo)) << 8).view(torch.float32)


def _fitting(upper: Tensor, lo: Tensor) -> Tensor:
    """The correction, or 0 where the upper half is zero and the correction negative: a zero was written over another number.

    The negative integer would wrap around to NaN.
    """
    return torch.where(((upper & 0x7FFF) == 0) & (lo < 0), 0, lo)


def _bits(x: Tensor) -> Tensor:
    # One NaN for all: with it, no sum above leaves the int32 range, which C++ would leave undefined.
    return torch.where(torch.isnan(x), QUIET_NAN, x.view(torch.int32))
