# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel of :func:`hbcore.rules.bases.inverse_factor` for matrices that fit on a chip: one program each.

A library's batched Cholesky and triangular solve take some twenty launches and ten times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hbcore.rules.launching import power_of_two, run

HALF = 64
"""The largest matrix that is eliminated at once; one of twice the size is two of them and four products."""


@triton.jit
def eliminated(w, n, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    r""":math:`L^{-1}` for :math:`L L^\top = W`, and whether it exists; ``W`` is symmetric, and the identity beyond ``n``.

    Elimination, column by column, of ``W`` and of the identity, which becomes the inverse. What is left of ``W`` in step ``j``
    are its columns after ``j``, and what differs from the identity are the columns before: both are kept in one matrix.
    """
    each = tl.arange(0, TILE)
    rows, columns = each[:, None], each[None, :]
    fine = 1
    for j in range(0, n):
        row = tl.sum(tl.where(rows == j, w, 0.0), 0)
        column = tl.sum(tl.where(columns == j, w, 0.0), 1)
        pivot = tl.sum(tl.where(each == j, row, 0.0), 0)
        fine = tl.where(pivot > 0, fine, 0)
        root = tl.rsqrt(tl.maximum(pivot, 1e-37))
        below = tl.where(each > j, column * root, 0.0)
        beside = tl.where(each == j, root, row * root)
        w = tl.where(columns == j, 0.0, w) - below[:, None] * beside[None, :]
        w = tl.where(rows == j, tl.where(each <= j, beside, 0.0)[None, :], w)
    return tl.where(columns <= rows, w, 0.0), fine


@triton.jit
def inverse_kernel(  # type: ignore[no-untyped-def]
    p, out, good, n, p_item, p_row, out_item, out_row, TILE: tl.constexpr, TWICE: tl.constexpr
):
    """``out`` is the inverse factor of ``p``: one tile, or with ``TWICE`` two and what is below the first one."""
    item = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, TILE)
    rows, columns = each[:, None], each[None, :]
    low, high = tl.maximum(rows, columns), tl.minimum(rows, columns)
    eye = tl.where(rows == columns, 1.0, 0.0)
    p += item * p_item
    out += item * out_item
    top = tl.minimum(n, TILE)
    inside = (rows < top) & (columns < top)
    first = tl.load(p + low * p_row + high, mask=inside, other=0.0)  # the lower half, mirrored
    first, fine = eliminated(tl.where(inside, first, eye), top, TILE)
    tl.store(out + rows * out_row + columns, first, mask=inside)
    if TWICE:
        rest = n - TILE
        below = (rows < rest) & (columns < TILE)
        corner = tl.load(p + (rows + TILE) * p_row + columns, mask=below, other=0.0)
        m = tl.dot(corner, tl.trans(first), input_precision="ieee")
        inside = (rows < rest) & (columns < rest)
        second = tl.load(p + (low + TILE) * p_row + high + TILE, mask=inside, other=0.0)
        second = second - tl.dot(m, tl.trans(m), input_precision="ieee")
        second, fine_too = eliminated(tl.where(inside, second, eye), rest, TILE)
        fine = fine * fine_too
        tl.store(out + (rows + TILE) * out_row + columns + TILE, second, mask=inside)
        corner = -tl.dot(second, tl.dot(m, first, input_precision="ieee"), input_precision="ieee")
        tl.store(out + (rows + TILE) * out_row + columns, corner, mask=below)
    tl.store(good + item, tl.minimum(tl.load(good + item), fine))


def inverse(p: Tensor, out: Tensor, good: Tensor) -> None:
    """Fill the lower half of ``out`` with the inverse factors of ``p``, both ``[B, n, n]`` in float32, with adjacent columns.

    Args:
        p: symmetric, of at most two :data:`HALF` sides; the lower half is read.
        out: where to; zeros.
        good: int32 ``[B]``; set to 0 where ``p`` is not positive definite.
    """
    n = p.shape[-1]
    sizes = (n, p.stride(0), p.stride(1), out.stride(0), out.stride(1))
    constants = (HALF, 1) if n > HALF else (max(16, power_of_two(n)), 0)
    run(inverse_kernel, (len(p), 1, 1), (p, out, good), sizes=sizes, constants=constants, num_warps=8)  # fewer would spill
