# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel of float32 products on tensor cores, each number as three of bfloat16; see :mod:`.square_kernel`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbcore.rules.launching import pieces, run
from hbcore.rules.square_kernel import AS_FLOAT32, read

ROWS, COLUMNS, DEPTH = 128, 128, 32
"""A tile of the result, and how much of the inner dimension is in fast memory at once."""

BAND = 8
"""How many rows of tiles are walked together, so that they share columns in the cache."""


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    a, b, out, m, n, k, a_batch, a_row, a_column, b_batch, b_row, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One tile of ``a b``. ``EVEN``: ``DEPTH`` divides ``k``."""
    down, across = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    item = (tl.program_id(0) // (down * across)).to(tl.int64)
    tile = tl.program_id(0) % (down * across)
    top = tile // (BAND * across) * BAND
    high = tl.minimum(down - top, BAND)
    i, j = top + tile % (BAND * across) % high, tile % (BAND * across) // high
    rows, columns = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # rows past the end wrap around to 0: they are read, but never stored
    left = a + item * a_batch + (rows % m)[:, None] * a_row + depth[None, :] * a_column
    right = b + item * b_batch + depth[:, None] * b_row + (columns % n)[None, :] * b_column
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        inside = start + depth < k
        x, y = read(left, inside[None, :], EVEN), read(right, inside[:, None], EVEN)
        total = tl.dot(x, y, total, input_precision=AS_FLOAT32)
        left += DEPTH * a_column
        right += DEPTH * b_row
    held = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(out + item * m * n + rows[:, None] * n + columns[None, :], total, mask=held)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` for float32 ``[B, m, k]`` and ``[B, k, n]`` of any strides, perhaps written to ``out``, contiguous."""
    (count, m, k), n = a.shape, b.shape[2]
    if out is None:
        out = torch.empty(count, m, n, dtype=torch.float32, device=a.device)
    grid = (count * pieces(m, ROWS) * pieces(n, COLUMNS), 1, 1)
    sizes = (m, n, k, *a.stride(), *b.stride())
    run(product_kernel, grid, (a, b, out), (), sizes, (ROWS, COLUMNS, DEPTH, BAND, int(k % DEPTH == 0)), num_warps=8)
    return out
