# mypy: disable-error-code="untyped-decorator"
"""The Triton kernels of :mod:`hb_psgd.lra_passes` that overwrite a factor, alone or together with a product that follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hb_psgd.lra_kernel import shares_of, sizes_of, tile_of
from hbcore.api import launching


@triton.jit
def changed(  # type: ignore[no-untyped-def]
    tile, turn, first_column, second_column, weights, rows, numel, R: tl.constexpr, PAD: tl.constexpr, TURNS: tl.constexpr,
    MOVES: tl.constexpr,
):  # fmt: skip
    """Rows of A become those of ``A T`` (with ``TURNS``) plus two columns times rows of ``weights`` (with ``MOVES``)."""
    columns = tl.arange(0, PAD)
    if TURNS:
        inside = (columns < R)[:, None] & (columns < R)[None, :]
        tile = tl.dot(
            tile, tl.load(turn + columns[:, None] * R + columns[None, :], mask=inside, other=0.0), input_precision="ieee"
        )
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
def rewritten_kernel(  # type: ignore[no-untyped-def]
    a, turn, first_column, second_column, weights, x, d, c, out, sums, numel, share, R: tl.constexpr, PAD: tl.constexpr,
    ROWS: tl.constexpr, TURNS: tl.constexpr, MOVES: tl.constexpr, THROUGH: tl.constexpr,
):  # fmt: skip
    """:func:`rewrite_kernel`, and in ``sums[program]`` the program's share of :math:`A^T y` with the new A, from one look at
    the old one: y is d x, or with ``THROUGH`` :math:`d x + A c`, which is written to ``out``."""
    total, columns = tl.zeros((PAD,), dtype=tl.float32), tl.arange(0, PAD)
    start = tl.program_id(0) * share
    for at in range(0, share, ROWS):
        rows = start + at + tl.arange(0, ROWS)
        tile = tile_of(a, start + at, numel, R, PAD, ROWS)
        tile = changed(tile, turn, first_column, second_column, weights, rows, numel, R, PAD, TURNS, MOVES)
        keep_tile(a, tile, rows, numel, R, PAD)
        value = tl.load(x + rows, mask=rows < numel, other=0.0) * tl.load(d + rows, mask=rows < numel, other=0.0)
        if THROUGH:
            value += tl.sum(tile * tl.load(c + columns, mask=columns < R, other=0.0)[None, :], 1)
            tl.store(out + rows, value, mask=rows < numel)
        total += tl.sum(tile * value[:, None], 0)
    tl.store(sums + tl.program_id(0) * PAD + columns, total)


def rewrite(a: Tensor, turn: Tensor | None, columns: list[Tensor], weights: Tensor | None) -> None:
    """Overwrite ``a`` with ``A T`` plus two columns times the rows of ``weights``; either may be absent."""
    r, pad, rows = sizes_of(a)
    constants = (r, pad, rows, int(turn is not None), int(bool(columns)))
    tensors = _change(a, turn, columns, weights)
    launching.run(rewrite_kernel, (launching.pieces(len(a), rows), 1, 1), tensors, sizes=(len(a),), constants=constants)


def inner(a: Tensor, turn: Tensor | None, columns: list[Tensor], weights: Tensor | None, x: Tensor, d: Tensor) -> Tensor:
    """:func:`rewrite`, and :math:`A^T (d x)` with the new A."""
    return _rewritten(a, turn, columns, weights, x, d, None)[1]


def through(
    a: Tensor, turn: Tensor | None, columns: list[Tensor], weights: Tensor | None, x: Tensor, d: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`rewrite`, and with the new A :math:`y = d x + A c` and :math:`A^T y`."""
    return _rewritten(a, turn, columns, weights, x, d, c.contiguous())


def _rewritten(
    a: Tensor, turn: Tensor | None, columns: list[Tensor], weights: Tensor | None, x: Tensor, d: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    r, pad, rows = sizes_of(a)
    programs, share = shares_of(len(a), rows)
    out, sums = x if c is None else torch.empty_like(x), a.new_empty(programs, pad)
    tensors = (*_change(a, turn, columns, weights), x, d, x if c is None else c, out, sums)
    constants = (r, pad, rows, int(turn is not None), int(bool(columns)), int(c is not None))
    launching.run(rewritten_kernel, (programs, 1, 1), tensors, sizes=(len(a), share), constants=constants)
    return out, sums.sum(0)[:r]


def _change(a: Tensor, turn: Tensor | None, columns: list[Tensor], weights: Tensor | None) -> tuple[Tensor, ...]:
    """The kernels' first arguments."""
    left, right = columns or (a, a)
    return a, a if turn is None else turn.contiguous(), left, right, a if weights is None else weights.contiguous()
