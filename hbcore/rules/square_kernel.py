# mypy: disable-error-code="untyped-decorator"
r"""The Triton kernel of second moments, :math:`\beta M + (1 - \beta) X X^\top`: half of the tiles, each written twice.

In float32 every number is exactly three bfloat16 ones, of which tensor cores multiply the six pairs that float32 can tell from
zero; Henry et al. 2019 (arXiv:1904.06376). On an H200 that is 2.4 times as fast as float32's own products, and closer to the
exact result, since fewer roundings add up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbcore.rules.launching import INTERPRETED, pieces, power_of_two, run
from hbcore.rules.triangle import tile_of

TILE = 128
"""The side of a tile, where matrices are that large."""

DEPTH, SPLIT_DEPTH = 32, 64
"""How much of the inner dimension is in fast memory at once: of float32, and of float16 parts, whose products are added up in
float32 after as many."""

BAND = 8
"""How many rows of tiles are walked together."""

AS_FLOAT32 = tl.constexpr("ieee" if INTERPRETED else "bf16x6")

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def read(at, inside, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is at these addresses, and zeros outside; with ``EVEN`` all of them are inside."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def square_kernel(  # type: ignore[no-untyped-def]
    high, low, scales, mean, out, decay, n, k, batch, row, column, TILE: tl.constexpr, DEPTH: tl.constexpr,
    BAND: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr, ADDS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """One tile and its mirror, of ``high high^T``, or with ``SPLIT`` of ``(high + low) (high + low)^T / scale^2``.

    ``ADDS``: ``mean`` is averaged with it; ``EVEN``: ``DEPTH`` divides ``k``; ``TOP``: parts are below two to this.
    """
    across = tl.cdiv(n, TILE)
    tiles = across * (across + 1) // 2
    item = (tl.program_id(0) // tiles).to(tl.int64)
    i, j = tile_of(tl.program_id(0) % tiles, across, BAND)
    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    # rows past the end wrap around to 0: they are read, but never stored
    left = item * batch + (rows % n)[:, None] * row + depth[None, :] * column
    right = item * batch + (columns % n)[None, :] * row + depth[:, None] * column
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    of_rows, of_columns = tl.zeros((TILE,), dtype=tl.float32), tl.zeros((TILE,), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        inside = start + depth < k
        x, y = read(high + left, inside[None, :], EVEN), read(high + right, inside[:, None], EVEN)
        if SPLIT:
            x_low, y_low = read(low + left, inside[None, :], EVEN), read(low + right, inside[:, None], EVEN)
            part = tl.dot(x_low, y)
            part = tl.dot(x, y_low, part)
            total += tl.dot(x, y, part)  # by itself: tensor cores drop bits from long sums
        else:
            total = tl.dot(x, y, total, input_precision=AS_FLOAT32)
            if ADDS:
                of_rows += tl.sum(x * x, 1)
                of_columns += tl.sum(y * y, 0)
        left += DEPTH * column
        right += DEPTH * column
    if SPLIT:
        inverse = 1 / tl.load(scales + item)
        total = total * inverse * inverse
    if ADDS:  # what overflows would stay in an average for ever; comparisons with NaN are false
        if SPLIT:
            total = tl.where(k * (inverse * TOP) * (inverse * TOP) <= LARGEST, total, 0.0)
        else:
            total = tl.where((of_rows <= LARGEST)[:, None] & (of_columns <= LARGEST)[None, :], total, 0.0)
    held = (rows < n)[:, None] & (columns < n)[None, :]
    here = item * n * n + rows[:, None] * n + columns[None, :]
    if ADDS:
        total = decay * tl.load(mean + here, mask=held, other=0.0) + (1 - decay) * total
    tl.store(out + here, total, mask=held)
    if i != j:
        mirrored = (columns < n)[:, None] & (rows < n)[None, :]
        tl.store(out + item * n * n + columns[:, None] * n + rows[None, :], tl.trans(total), mask=mirrored)


def squared(
    high: Tensor,
    low: Tensor | None = None,
    scales: Tensor | None = None,
    mean: Tensor | None = None,
    decay: float = 0.0,
    top: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    r""":math:`\beta M + (1 - \beta) X X^\top`, or :math:`X X^\top`.

    In an average rows of :math:`X` whose squares overflow count as zeros; of parts, all rows do where squares might overflow.

    Args:
        high: :math:`X` itself, float32 ``[B, n, k]``, or its float16 high part.
        low, scales: its low part, of the same strides, and the scale of each matrix, ``[B]``; None for float32.
        mean: :math:`M`, symmetric, ``[B, n, n]``, or None.
        decay: :math:`\beta`.
        top: scaled matrices are below two to this.
        out: memory for the result, contiguous, perhaps :math:`M`'s own; None for new memory.
    """
    count, n, k = high.shape
    if out is None:
        out = torch.empty(count, n, n, dtype=torch.float32, device=high.device)
    tile = min(TILE, max(16, power_of_two(n)))
    depth = DEPTH if low is None else SPLIT_DEPTH
    across = pieces(n, tile)
    mean = None if mean is None else mean.contiguous()
    tensors = (high, *(out if t is None else t for t in (low, scales, mean)), out)
    constants = (tile, depth, BAND, int(k % depth == 0), int(low is not None), int(mean is not None), 2**top)
    grid, sizes = (count * across * (across + 1) // 2, 1, 1), (n, k, *high.stride())
    run(square_kernel, grid, tensors, (decay,), sizes, constants, num_warps=8 if tile == TILE else 4)
    return out
