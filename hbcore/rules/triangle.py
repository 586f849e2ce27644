# mypy: disable-error-code="untyped-decorator"
"""Triton functions for kernels that compute the tiles on and below a diagonal, and mirror them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of(t):  # type: ignore[no-untyped-def]
    """The row of entry ``t`` of a lower triangle that is counted row by row: ``row (row + 1) / 2 <= t``."""
    row = ((tl.sqrt(8.0 * t + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)  # a float32 root may be off by one
    return tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)


@triton.jit
def tile_of(t, across, BAND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of tile ``t`` among those on and below the diagonal of ``across`` by ``across`` tiles.

    Bands of ``BAND`` rows are walked column by column, so that tiles that run together share rows and columns in the cache.
    """
    top = row_of(t) // BAND * BAND
    high = tl.minimum(across - top, BAND)
    t = t - top * (top + 1) // 2
    corner = t - high * top  # the square on the band's left comes first, its triangle afterwards
    row = row_of(tl.maximum(corner, 0))
    column = corner - row * (row + 1) // 2
    left = corner < 0
    return top + tl.where(left, t % high, row), tl.where(left, t // high, top + column)
