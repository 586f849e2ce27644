# mypy: disable-error-code="untyped-decorator"
r"""The Triton kernels of :func:`hb_psgd.norms.norm_bound`, and of the bound and the step that follow from it.

What lies between the power iteration's products takes one launch each, and the matrices are read, never divided: the vectors
are scaled instead, to :math:`2^{\pm 20}`, which keeps products with matrices of any size inside float32's range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hb_psgd.fitting_kernel import finite_size
from hbcore.api import launching

ROWS, COLUMNS = 8, 128
"""Rows of a matrix for each program, and how much of them is read at once."""

LARGE: tl.constexpr = tl.constexpr(2.0**20)


@triton.jit
def rows_kernel(a, sizes, squares, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row its largest magnitude ``m``, inf if one is not finite, and the sum of ``(x / m)^2``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    most = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for at in range(0, n, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        value = tl.load(a + row[:, None] * n + column[None, :], mask=(row < rows)[:, None] & (column < n)[None, :], other=0.0)
        risen = tl.maximum(most, tl.max(finite_size(value), 1))
        by = tl.where(risen > 0, risen, 1.0)
        shrunk = tl.div_rn(most, by)
        ratio = tl.div_rn(value, by[:, None])
        total = total * shrunk * shrunk + tl.sum(ratio * ratio, 1)
        most = risen
    tl.store(sizes + row, most, mask=row < rows)
    tl.store(squares + row, total, mask=row < rows)


@triton.jit
def unit(v):  # type: ignore[no-untyped-def]
    """A vector divided by its norm, 0 for 0; and the norm, as a factor and its largest element."""
    most = tl.max(finite_size(v), 0)
    v = tl.div_rn(v, tl.where(most > 0, most, 1.0))
    norm = tl.sqrt_rn(tl.sum(v * v, 0))
    return tl.div_rn(v, tl.where(norm > 0, norm, 1.0)), norm, most


@triton.jit
def length_of(size):  # type: ignore[no-untyped-def]
    """How long vectors are before a product with a matrix whose largest element is ``size``."""
    return tl.where(size > 1, 1 / LARGE, LARGE)


@triton.jit
def begin_kernel(a, sizes, squares, start, v, largest, n, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vector ``pid0`` of matrix ``pid1``: its longest row plus or minus ``start``; and the matrix's largest element."""
    item = tl.program_id(1).to(tl.int64)
    each = tl.arange(0, BLOCK)
    inside = each < n
    size = tl.load(sizes + item * n + each, mask=inside, other=0.0)
    most = tl.max(size, 0)
    by = tl.where(most > 0, most, 1.0)
    ratio = tl.div_rn(size, by)
    square = tl.load(squares + item * n + each, mask=inside, other=0.0) * ratio * ratio
    j = tl.argmax(tl.where(inside, square, -1.0), 0)
    longest = tl.div_rn(tl.load(a + item * n * n + j * n + each, mask=inside, other=0.0), by)
    at = (item * count + tl.program_id(0)) * n + each
    drawn = tl.load(start + at, mask=inside, other=0.0)
    along = tl.sum(longest * drawn, 0)
    made, _, _ = unit(longest + tl.where(along > 0, 1.0, tl.where(along < 0, -1.0, 0.0)) * drawn)
    tl.store(v + at, made * length_of(most), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(largest + item, most)


@triton.jit
def unit_kernel(v, largest, n, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Vectors ``pid0`` of all, ``count`` for each matrix, as long as they should be before the next product."""
    each = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * n + each
    made, _, _ = unit(tl.load(v + at, mask=each < n, other=0.0))
    tl.store(v + at, made * length_of(tl.load(largest + tl.program_id(0) // count)), mask=each < n)


@triton.jit
def bound_kernel(  # type: ignore[no-untyped-def]
    v, largest, level, bound, risen, step, lr, beta, n, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """The norm of matrix ``pid0``, from its longest vector and with ``level`` added; its running bound, and the step."""
    item = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCK)
    most = 0.0
    for k in range(0, COUNT):
        _, norm, factor = unit(tl.load(v + (item * COUNT + k) * n + each, mask=each < n, other=0.0))
        most = tl.maximum(most, finite_size(norm * factor))
    size = tl.load(largest + item)
    norm = tl.where(size < float("inf"), most / length_of(size), float("inf")) + tl.load(level + item)
    made = tl.maximum(beta * tl.load(bound + item) + (1 - beta) * norm, norm)
    tl.store(risen + item, made)
    tl.store(step + item, tl.div_rn(lr, made))


def bounded(
    a: Tensor, start: Tensor, level: Tensor, bound: Tensor, lr: float, beta: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """The running bounds of matrices' norms, and the steps that follow from them; see :mod:`hb_psgd.factor_rules`.

    Args:
        a: symmetric positive matrices, ``[B, n, n]``.
        start: normal numbers, ``[B, k, n]``.
        level: the multiple of the identity that each lacks, ``[B]``.
        bound: the bounds so far, ``[B]``.
        lr: the factors' learning rate.
        beta: the bounds' decay.
        iterations: :func:`~hb_psgd.norms.norm_bound`'s.

    Returns:
        Bounds and steps, ``[B]`` each; inf and 0 where a matrix is not finite.
    """
    (blocks, count, n), block = start.shape, launching.power_of_two(start.shape[2])
    sizes, squares = a.new_empty(blocks * n), a.new_empty(blocks * n)
    largest, risen, step = a.new_empty(blocks), a.new_empty(blocks), a.new_empty(blocks)
    grid, warps = (launching.pieces(blocks * n, ROWS), 1, 1), 8 if block > 1024 else 4
    launching.run(rows_kernel, grid, (a, sizes, squares), (), (blocks * n, n), (ROWS, COLUMNS), num_warps=4)
    v = torch.empty_like(start)
    tensors = (a, sizes, squares, start, v, largest)
    launching.run(begin_kernel, (count, blocks, 1), tensors, (), (n, count), (block,), num_warps=warps)
    for k in range(2 * iterations):
        if k:
            launching.run(unit_kernel, (blocks * count, 1, 1), (v, largest), (), (n, count), (block,), num_warps=warps)
        v = torch.bmm(v, a)
    tensors = (v, largest, level, bound, risen, step)
    launching.run(bound_kernel, (blocks, 1, 1), tensors, (lr, beta), (n,), (count, block), num_warps=warps)
    return risen, step
