"""A float32 as a float16 and a signed correction in units of 2^-8 or 2^-16 of the float16's last bit.

As in :mod:`hb_ecc.ulp`, integer arithmetic on bits, so that no compiler can optimise the correction away. A float16 has fewer
exponents than a float32, so that its bits are no part of a float32's; but here too, the next magnitude has the next integer as
its bits. ``extra`` more bits below the 15 of a magnitude make an integer ``c`` of a finer float:

=====================  =====================================================  ==================================
``|x|``                ``c``                                                  comes back within
=====================  =====================================================  ==================================
from 2^-14 on          ``bits - (112 << 23)``, shifted from 23 bits of        2^-19 of itself, relatively; with 16
                       mantissa to ``10 + extra``                             extra bits as itself, bit for bit
below, subnormal       ``|x| * 2^(24 + extra)``                               2^-33; with 16 extra bits 2^-41
=====================  =====================================================  ==================================

Then ``hi = (c + half) >> extra`` with ``half = 1 << (extra - 1)``, and ``lo`` is the lower ``extra`` bits of ``c``, as a signed
integer. The sign is ``hi``'s. Both roundings are to nearest, halves away from zero. The special values:

* Magnitudes beyond the largest pair, 65519.875 with 8 extra bits and 65519.996 with 16, are stored as that pair: finite stays
  finite, where float16 has inf from 65520 on. ``hi`` alone then reads 65504.
* ±0 and ±inf are exact. NaN comes back as the quiet NaN 0x7fc00000.
* Below 2^-33, or 2^-41, a number comes back as zero, with its sign.
* A ``hi`` of inf or NaN stands for itself whatever the correction, and zero beside a negative correction is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hb_ecc.ulp import bits_of

NEAREST = 0x10
"""The dither that rounds to nearest the five bits of a float32's mantissa that 8 extra bits have no room for."""

_BIAS = (127 - 15) << 23
"""What a float32's bits exceed those of the same number as a float16 with 23 bits of mantissa by."""
_NORMAL = (127 - 14) << 23
"""The bits of the float32 2^-14, the smallest normal float16."""
_LARGEST_8 = _BIAS + (0x7BFF7F << 5)
_LARGEST_16 = _BIAS + (0x7BFF7FFF >> 3)
"""The bits of the largest pair's float32: 65504 and the largest correction."""
_INF = 0x7F800000


def split_8(x: Tensor, dither: Tensor | int = NEAREST) -> tuple[Tensor, Tensor]:
    """``x`` (float32) rounded to 24 bits, as float16 and int8.

    Args:
        x: any shape.
        dither: int32 in [0, 32), added before the low five bits are cut off. The default rounds to nearest; five uniform
            random bits round stochastically, up with a probability that is the fraction that is cut off.
    """
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    subnormal = (_below_normal(x) * 2.0**37).to(torch.int32)
    fine = torch.where(magnitude < _NORMAL, subnormal, torch.clamp(magnitude, max=_LARGEST_8) - _BIAS)
    code = (fine + dither) >> 5
    return _upper(bits, magnitude, (code + 0x80) >> 8), code.to(torch.int8)


def split_16(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (float32) as float16 and int16; exactly from 2^-14 to the largest pair."""
    bits = bits_of(x)
    magnitude = bits & 0x7FFFFFFF
    subnormal = ((_below_normal(x) * 2.0**41).to(torch.int32) + 1) >> 1
    code = torch.where(magnitude < _NORMAL, subnormal, (torch.clamp(magnitude, max=_LARGEST_16) - _BIAS) << 3)
    return _upper(bits, magnitude, (code + 0x8000) >> 16), code.to(torch.int16)


def join_8(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that :func:`split_8` rounded to."""
    code = _code(hi, lo, 8)
    small = code.to(torch.float32) * 2.0**-32
    return _signed(torch.where(code < 1 << 18, small, ((code << 5) + _BIAS).view(torch.float32)), hi)


def join_16(hi: Tensor, lo: Tensor) -> Tensor:
    """The float32 that :func:`split_16` rounded to."""
    code = _code(hi, lo, 16)
    small = code.to(torch.float32) * 2.0**-40
    return _signed(torch.where(code < 1 << 26, small, ((code >> 3) + _BIAS).view(torch.float32)), hi)


def _below_normal(x: Tensor) -> Tensor:
    """The magnitude of a number below 2^-14, and 0 for others: products of it fit an int32."""
    magnitude = x.abs()
    return torch.where(magnitude < 2.0**-14, magnitude, 0.0)


def _upper(bits: Tensor, magnitude: Tensor, rounded: Tensor) -> Tensor:
    """The float16 of magnitude ``rounded``, with the sign of ``bits``; inf and NaN where ``magnitude`` is theirs."""
    special = 0x7C00 | ((magnitude >> 13) & 0x3FF)
    return (torch.where(magnitude < _INF, rounded, special) | ((bits >> 16) & -0x8000)).to(torch.int16).view(torch.float16)


def _code(hi: Tensor, lo: Tensor, extra: int) -> Tensor:
    """The bits of ``|hi|`` and the extra ones; not below 0, where zero was written beside a negative correction."""
    upper = hi.view(torch.int16).to(torch.int32) & 0x7FFF
    return torch.clamp((upper << extra) + lo.to(torch.int32), min=0)


def _signed(magnitude: Tensor, hi: Tensor) -> Tensor:
    """``magnitude`` with the sign of ``hi``; ``hi`` itself where it is inf or NaN."""
    bits = hi.view(torch.int16).to(torch.int32)
    value = torch.where(bits < 0, -magnitude, magnitude)
    return torch.where((bits & 0x7FFF) < 0x7C00, value, hi.to(torch.float32))
