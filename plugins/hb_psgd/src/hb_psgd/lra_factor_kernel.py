# mypy: disable-error-code="untyped-decorator"
"""The Triton kernels of :mod:`hb_psgd.lra_passes` over one factor: they overwrite it, or multiply by it, or both at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from hb_psgd.lra_kernel import shares_of, sizes_of, tile_of
from hbcore.api import launching

if TYPE_CHECKING:
    from hb_psgd.lra_passes import Change


PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")
"""Of products with a turn. Three products on tensor cores are as exact as one without, which takes five times as long as
reading the factor: its operands pass through shared memory."""


@triton.jit
def changed(  # type: ignore[no-untyped-def]
    tile, turn, first_column, second_column, weights, rows, numel, R: tl.constexpr, PAD: tl.constexpr, TURNS: tl.constexpr,
    MOVES: tl.constexpr,
):  # fmt: skip
    """Rows of A become those of ``A T`` (with ``TURNS``) plus two columns times rows of ``weights`` (with ``MOVES``)."""
    columns = tl.arange(0, PAD)
    if TURNS:
        inside = (columns < R)[:, None] & (columns < R)[None, :]
        by = tl.load(turn + columns[:, None] * R + columns[None, :], mask=inside, other=0.0)
        tile = tl.dot(tile, by, input_precision=PRECISION)
    if MOVES:
        left = tl.load(first_column + rows, mask=rows < numel, other=0.0)
        right = tl.load(second_column + rows, mask=rows < numel, other=0.0)
        tile += left[:, None] * tl.load(weights + columns, mask=columns < R, other=0.0)[None, :]
        tile += right[:, None] * tl.load(weights + R + columns, mask=columns < R, other=0.0)[None, :]
    return tile


@triton.jit
def keep_tile(a, tile, rows, numel, R: tl.constexpr, PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write rows of a matrix."""
    columns = tl.arange(0, PAD)
    inside = (rows < numel)[:, None] & (columns < R)[None, :]
    tl.store(a + rows.to(tl.int64)[:, None] * R + columns[None, :], tile, mask=inside)


@triton.jit
def rewrite_kernel(  # type: ignore[no-untyped-def]
    a, turn, first_column, second_column, weights, numel, R: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
    TURNS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """:func:`changed` of all rows, in place."""
    first = tl.program_id(0) * ROWS
    rows = first + tl.arange(0, ROWS)
    tile = tile_of(a, first, numel, R, PAD, ROWS)
    tile = changed(tile, turn, first_column, second_column, weights, rows, numel, R, PAD, TURNS, MOVES)
    keep_tile(a, tile, rows, numel, R, PAD)


@triton.jit
def product_kernel(  # type: ignore[no-untyped-def]
    a, turn, first_column, second_column, weights, x, d, c, out, sums, numel, share, R: tl.constexpr, PAD: tl.constexpr,
    ROWS: tl.constexpr, TURNS: tl.constexpr, MOVES: tl.constexpr, CHANGES: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """The program's share of :math:`A^T y`, in ``sums[program]``, from one look at A, with ``CHANGES`` first overwritten
    as :func:`rewrite_kernel` does it. y is d x, or with ``THROUGH`` :math:`d x + A c`, which is written to ``out``."""
    total, columns = tl.zeros((PAD,), dtype=tl.float32), tl.arange(0, PAD)
    start = tl.program_id(0) * share
    for at in range(0, share, ROWS):
        rows = start + at + tl.arange(0, ROWS)
        tile = tile_of(a, start + at, numel, R, PAD, ROWS)
        if CHANGES:
            tile = changed(tile, turn, first_column, second_column, weights, rows, numel, R, PAD, TURNS, MOVES)
            keep_tile(a, tile, rows, numel, R, PAD)
        value = tl.load(x + rows, mask=rows < numel, other=0.0) * tl.load(d + rows, mask=rows < numel, other=0.0)
        if THROUGH:
            value += tl.sum(tile * tl.load(c + columns, mask=columns < R, other=0.0)[None, :], 1)
            tl.store(out + rows, value, mask=rows < numel)
        total += tl.sum(tile * value[:, None], 0)
    tl.store(sums + tl.program_id(0) * PAD + columns, total)


def rewrite(a: Tensor, change: Change) -> None:
    """See :func:`hb_psgd.lra_passes.rewrite`."""
    r, pad, rows = sizes_of(a)
    tensors, flags = _arguments(a, change)
    grid = (launching.pieces(len(a), rows), 1, 1)
    launching.run(rewrite_kernel, grid, tensors, sizes=(len(a),), constants=(r, pad, rows, *flags))


def inner(a: Tensor, x: Tensor, d: Tensor, change: Change) -> Tensor:
    """See :func:`hb_psgd.lra_passes.inner`."""
    return _product(a, x, d, None, change)[1]


def through(x: Tensor, a: Tensor, c: Tensor, d: Tensor, change: Change) -> tuple[Tensor, Tensor]:
    """See :func:`hb_psgd.lra_passes.through`."""
    return _product(a, x, d, c.contiguous(), change)


def _product(a: Tensor, x: Tensor, d: Tensor, c: Tensor | None, change: Change) -> tuple[Tensor, Tensor]:
    """y, where it is not d x, and A^T y."""
    r, pad, rows = sizes_of(a)
    programs, share = shares_of(len(a), rows)
    out, sums = x if c is None else torch.empty_like(x), a.new_empty(programs, pad)
    tensors, flags = _arguments(a, change)
    constants = (r, pad, rows, *flags, int(change.changes), int(c is not None))
    given = (*tensors, x, d, x if c is None else c, out, sums)
    launching.run(product_kernel, (programs, 1, 1), given, sizes=(len(a), share), constants=constants)
    return out, sums.sum(0)[:r]


def _arguments(a: Tensor, change: Change) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """The kernels' first arguments, ``a`` in place of what there is none of; and whether it turns and moves."""
    left, right = change.columns or (a, a)
    turn, weights = a if change.turn is None else change.turn.contiguous(), change.together(a.dtype)
    return (a, turn, left, right, a if weights is None else weights), (int(change.turn is not None), int(weights is not None))
