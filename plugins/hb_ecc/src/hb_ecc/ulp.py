"""A float32 as a bfloat16 and a signed correction, with integer arithmetic only.

A bfloat16 is the upper half of a float32. On their bits as integers, rounding to bfloat16 drops low bits, and the dropped part
is a small signed integer: the correction, in units of the last bit kept. No scale is stored and no exponent extracted,
and no compiler can optimise the round trip away, as it may ``x - bfloat16(x)``.

=========  ==========================================  =====  =============================================================
parts      encoding of ``bits``, a float32 as an int32  bytes  comes back as
=========  ==========================================  =====  =============================================================
16 + 16    ``hi = (bits + 0x8000) >> 16``              2 + 2  itself, bit for bit: ``(hi << 16) + lo``
           ``lo = bits``, the lower 16 bits
16 + 8     ``r = bits + 0x80``                         2 + 1  within 2^-16 of itself, relatively, and within 2^-142 below
           ``hi = (r + 0x8000) >> 16``                        2^-126: ``((hi << 8) + lo) << 8``
           ``lo = r >> 8``, the lower 8 bits
=========  ==========================================  =====  =============================================================

The lower bits are a signed integer: from half the last bit of ``hi`` on they are negative, and ``hi`` is the next one.
A float is sign and magnitude, and its int32 is ``-2^31 + magnitude`` when the sign is set; shifting right floors, so both
signs round their magnitude alike, halves away from zero. The special values:

* ±0, ±inf and denormals are not special when they are written: they are integers like the others.
* NaN comes back as the quiet NaN ``0x7fc00000``; rounded like a number, one with a small payload would become inf.
* Values that would round up to inf in 24 bits (from ``0x7f7fff80``, 3.4027977e38, on) are truncated: finite stays finite.
* A pair that is no number stands for ``hi`` alone. NaN is such a pair; so is inf beside a positive correction, or
  zero beside a negative one, after something else wrote ``hi``: the sum is a NaN's bits, or wraps around into them.
* ``hi`` alone may read inf where the float32 is finite, from ``0x7f7f8000`` on, as rounding to bfloat16 always has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUIET_NAN = 0x7FC00000
NEAREST = 0x80
"""The dither that rounds eight bits to nearest."""

_NEAR_INF = 3.4027717462407993e38
"""The float32 of bits 0x7f7fff00, the first of the last 256 below inf: adding a dither of up to 255 may carry into inf."""


def split32(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (float32) as bfloat16 and int16, exactly: :func:`join32` returns ``x``."""
    bits = bits_of(x)
    return _upper(bits), bits.to(torch.int16)


def join32(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that :func:`split32` split."""
    upper = hi.view(torch.int16).to(torch.int32)
    return _number((upper << 16) + lo.to(torch.int32), hi)


def split24(x: Tensor, dither: Tensor | int = NEAREST) -> tuple[Tensor, Tensor]:
    """``x`` (float32) rounded to 24 bits, as bfloat16 and int8.

    Args:
        x: any shape.
        dither: int32 in [0, 256), added before the low eight bits are cut off. The default rounds to nearest; eight uniform
            random bits round stochastically, up with a probability that is the fraction that is cut off.
    """
    bits = bits_of(x)
    rounded = torch.where(x.abs() < _NEAR_INF, bits + dither, bits)
    return _upper(rounded), (rounded >> 8).to(torch.int8)


def join24(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that :func:`split24` rounded to."""
    upper = hi.view(torch.int16).to(torch.int32)
    # two shifts of 8, not one of 16 and one of 8: a sum that wraps around would be undefined in C++, and a shift is not
    return _number(((upper << 8) + lo.to(torch.int32)) << 8, hi)


def _upper(bits: Tensor) -> Tensor:
    """The bfloat16 that float32 ``bits`` round to, halves away from zero."""
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


def _number(bits: Tensor, hi: Tensor) -> Tensor:
    """The float32 of ``bits``; ``hi`` where that is none."""
    x = bits.view(torch.float32)
    return torch.where(torch.isnan(x), hi.to(torch.float32), x)


def bits_of(x: Tensor) -> Tensor:
    """The bits of a float32 as int32; for every NaN, those of :data:`QUIET_NAN`."""
    # With one NaN for all, no sum above leaves the int32 range, which C++ would leave undefined.
    return torch.where(torch.isnan(x), QUIET_NAN, x.view(torch.int32))
