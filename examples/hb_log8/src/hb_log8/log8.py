"""The codec: a sign and seven bits of a logarithm, relative to the largest magnitude of 32 neighbouring elements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hbcore.api import block_amax, spread

LARGEST = 127
STEP = 20
"""A step is 2^20 in a float32's bits, an eighth of an octave."""

_INF, _QUIET_NAN = 0x7F800000, 0x7FC00000


@dataclass(frozen=True)
class Log8:
    r"""``"log8"``: 1.125 bytes an element; the relative error is at most 1/16, from 2^-15 of the block's largest magnitude on.

    The bits of a float32, as an integer, are its logarithm to base 2 in units of 2^-23, with straight lines between the powers
    of two, :math:`\ell(x)`. With :math:`s` the block's largest magnitude,

    .. math::
        q = \mathrm{sign}(x) \max\left(1, 127 - \mathrm{round}(8 (\ell(s) - \ell(|x|)))\right), \quad q = 0 \text{ if } x = 0
        \qquad
        |x| \approx \ell^{-1}\left(\ell(s) - \frac{127 - |q|}{8}\right)

    which is integer arithmetic, and so the same on every backend; logarithms of libraries are not. What is smaller than the
    last of the steps is stored as that, and never as zero. The largest magnitude comes back as it is. If one element of a block
    is inf or NaN, all that are not zero read as it does.
    """

    name: ClassVar[str] = "log8"
    rounds: ClassVar[bool] = False

    def parts(self, slot: str, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The codes, of the slot's shape, and the blocks' largest magnitudes; float64 parameters keep float64 state."""
        return {slot: torch.float64} if dtype == torch.float64 else {slot: torch.int8, f"{slot}#max": torch.float32}

    def per_block(self, slot: str) -> frozenset[str]:
        """The largest magnitudes."""
        return frozenset({f"{slot}#max"})

    def read(self, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype) -> Tensor:
        """The logical value of ``slot`` in ``dtype``."""
        if stored[slot].dtype == torch.float64:
            return stored[slot].to(dtype)
        code = stored[slot].to(torch.int32)
        below = (LARGEST - code.abs()) << STEP
        bits = torch.clamp(spread(stored[f"{slot}#max"].view(torch.int32), code) - below, min=1)
        value = bits.view(torch.float32)
        return torch.where(code == 0, 0.0, torch.where(code < 0, -value, value)).to(dtype)

    def write(self, stored: Mapping[str, Tensor], slot: str, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """The new stored tensors of ``slot``, to nearest."""
        if stored[slot].dtype == torch.float64:
            return {slot: value.to(torch.float64)}
        value = value.to(torch.float32)
        magnitude = value.abs()
        top = _bits(block_amax(magnitude))
        wide = spread(top, magnitude)
        steps = (wide - _bits(magnitude) + (1 << (STEP - 1))) >> STEP
        code = torch.where(wide < _INF, torch.clamp(LARGEST - steps, min=1), LARGEST)
        code = torch.where(magnitude == 0, 0, torch.where(value < 0, -code, code))
        return {slot: code.to(torch.int8), f"{slot}#max": top.view(torch.float32)}


def _bits(x: Tensor) -> Tensor:
    """The bits of a float32 that is not negative; of every NaN, the same."""
    return torch.where(torch.isnan(x), _QUIET_NAN, x.view(torch.int32))
