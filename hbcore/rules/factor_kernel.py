# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel of :func:`hbcore.rules.bases.inverse_factor` for matrices that fit on a chip: one program each.

A library's batched Cholesky and triangular solve take some twenty launches and ten times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hbcore.rules.products_kernel import on


@triton.jit
def inverse_kernel(  # type: ignore[no-untyped-def]
    p, out, good, n, p_item, p_row, out_item, out_row, TILE: tl.constexpr
):
    r"""``out`` is :math:`L^{-1}` for :math:`L L^\top = P`: elimination, column by column, of ``P`` and of the identity."""
    item = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    inside = (rows < n) & (columns < n)
    eye = tl.where(rows == columns, 1.0, 0.0)
    low, high = tl.maximum(rows, columns), tl.minimum(rows, columns)
    a = tl.load(p + item * p_item + low * p_row + high, mask=inside, other=0.0)  # the lower half, mirrored
    a = tl.where(inside, a, eye)
    x = eye
    fine = tl.load(good + item)
    for j in range(0, n):
        column = tl.sum(tl.where(columns == j, a, 0.0), 1)
        row = tl.sum(tl.where(rows == j, x, 0.0), 0)
        pivot = tl.sum(tl.where(tl.arange(0, TILE) == j, column, 0.0), 0)
        fine = tl.where(pivot > 0, fine, 0)
        root = tl.rsqrt(tl.maximum(pivot, 1e-38))
        factor = tl.where(tl.arange(0, TILE) > j, column * root, 0.0)
        row = row * root
        a = a - factor[:, None] * factor[None, :]
        x = tl.where(rows == j, row[None, :], x - factor[:, None] * row[None, :])
    tl.store(out + item * out_item + rows * out_row + columns, x, mask=inside)
    tl.store(good + item, fine)


def inverse(p: Tensor, out: Tensor, good: Tensor) -> None:
    """Fill ``out`` with the inverse factors of ``p``, both ``[B, n, n]`` float32 with rows of adjacent elements.

    Args:
        p: symmetric; the lower half is read.
        out: where to.
        good: int32 ``[B]``; set to 0 where ``p`` is not positive definite.
    """
    n = p.shape[-1]
    tile = max(16, triton.next_power_of_2(n))
    with on(p.device):
        inverse_kernel[(len(p),)](
            p, out, good, n, p.stride(0), p.stride(1), out.stride(0), out.stride(1), tile, num_warps=8 if tile > 64 else 4
        )
