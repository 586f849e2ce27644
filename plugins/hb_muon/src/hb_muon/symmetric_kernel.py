# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel of :mod:`hb_muon.symmetric`: half of a symmetric product, and its mirror. Imported on first launch."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbcore.api import launching, triangle

WIDENS = tl.constexpr(launching.INTERPRETED)
"""Triton's interpreter multiplies the bits of bfloat16 as if they were integers; it is given float32 instead, whose products of
bfloat16 numbers are as exact as a GPU's."""


@triton.jit
def multiplied(x, y, total):  # type: ignore[no-untyped-def]
    """``total + x y``, in float32."""
    if WIDENS:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), total)
    else:
        return tl.dot(x, y, total)


@triton.jit
def by_descriptors(  # type: ignore[no-untyped-def]
    a, b, item, i, j, n, k, TILE: tl.constexpr, DEPTH: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr
):
    """Tile ``(i, j)`` of matrix ``item`` of ``a b``, read through descriptors of the stacks seen as one matrix each."""
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        if A_ROWS:
            x = a.load([item * n + i * TILE, start])
        else:
            x = a.load([item * k + start, i * TILE]).T
        if B_ROWS:
            y = b.load([item * k + start, j * TILE])
        else:
            y = b.load([item * n + j * TILE, start]).T
        total = multiplied(x, y, total)
    return total


@triton.jit
def by_pointers(  # type: ignore[no-untyped-def]
    a, b, i, j, n, k, a_lead, b_lead,
    TILE: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
):  # fmt: skip
    """Tile ``(i, j)`` of the product of the matrices that begin at ``a`` and ``b``."""
    # rows past the end wrap around to 0: they are read, but never stored
    rows, columns = (i * TILE + tl.arange(0, TILE)) % n, (j * TILE + tl.arange(0, TILE)) % n
    depth = tl.arange(0, DEPTH)
    if A_ROWS:
        a_at = a + rows[:, None] * a_lead + depth[None, :]
        a_step = DEPTH
    else:
        a_at = a + rows[:, None] + depth[None, :] * a_lead
        a_step = DEPTH * a_lead
    if B_ROWS:
        b_at = b + depth[:, None] * b_lead + columns[None, :]
        b_step = DEPTH * b_lead
    else:
        b_at = b + depth[:, None] + columns[None, :] * b_lead
        b_step = DEPTH
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        if EVEN:
            x, y = tl.load(a_at), tl.load(b_at)
        else:
            inside = start + depth < k
            x = tl.load(a_at, mask=inside[None, :], other=0.0)
            y = tl.load(b_at, mask=inside[:, None], other=0.0)
        total = multiplied(x, y, total)
        a_at += a_step
        b_at += b_step
    return total


@triton.jit
def half_product(  # type: ignore[no-untyped-def]
    a, b, d, out, n, k, a_batch, a_lead, b_batch, b_lead, d_batch, d_row, alpha, beta,
    TILE: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of ``alpha a b + beta d``, and its mirror; ``d`` is read unless ``beta`` is 0.

    ``A_ROWS``: ``a``'s rows are contiguous, with the stride ``a_lead``; otherwise its columns are. Likewise ``b``. ``EVEN``:
    ``DEPTH`` divides ``k``. ``DESCRIBED``: ``a`` and ``b`` are descriptors of stacks seen as one matrix each, with contiguous
    rows.
    """
    across = tl.cdiv(n, TILE)
    tiles = across * (across + 1) // 2
    item = tl.program_id(0) // tiles
    i, j = triangle.tile_of(tl.program_id(0) % tiles, across, BAND)
    item64 = item.to(tl.int64)  # a stack may have more entries than int32 counts
    if DESCRIBED:
        total = by_descriptors(a, b, item, i, j, n, k, TILE, DEPTH, A_ROWS, B_ROWS)
    else:
        x, y = a + item64 * a_batch, b + item64 * b_batch
        total = by_pointers(x, y, i, j, n, k, a_lead, b_lead, TILE, DEPTH, EVEN, A_ROWS, B_ROWS)
    total = total * alpha
    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    held = (rows < n)[:, None] & (columns < n)[None, :]
    if beta != 0:  # at run time: a kernel without this would be one more to compile
        added = tl.load(d + item64 * d_batch + rows[:, None] * d_row + columns[None, :], mask=held, other=0.0)
        total += beta * added.to(tl.float32)
    result = total.to(out.dtype.element_ty)
    out += item64 * n * n
    tl.store(out + rows[:, None] * n + columns[None, :], result, mask=held)
    if i != j:
        mirrored = (columns < n)[:, None] & (rows < n)[None, :]
        tl.store(out + columns[:, None] * n + rows[None, :], tl.trans(result), mask=mirrored)


@lru_cache(maxsize=1)
def descriptors() -> Any:
    """Triton's host-side descriptors, or None if this version has none."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    return TensorDescriptor


def described(x: Tensor, side: int, depth: int, k: int, rows_are_k: bool) -> Any:
    """A descriptor of the stack ``x`` ``[B, r, c]`` as one matrix ``[B r, c]``, or None where the hardware does not support it.

    A block that extends past a matrix's ``k`` would read the next one, so ``depth`` must divide ``k``.
    """
    fits = x.stride(0) == x.shape[1] * x.stride(1) or len(x) == 1
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    if descriptors() is None or x.stride(2) != 1 or not fits or not aligned or k % depth:
        return None
    block = [depth, side] if rows_are_k else [side, depth]
    return descriptors()(x, [len(x) * x.shape[1], x.shape[2]], [x.stride(1), 1], block)


def launch_half(out: Tensor, a: Tensor, b: Tensor, d: Tensor | None, alpha: float, beta: float, tiling: Any) -> None:
    """Fill ``out`` ``[B, n, n]``, contiguous, as :func:`hb_muon.symmetric.half_and_mirror` describes."""
    batch, n, k = a.shape
    if batch * n == 0:
        return
    across = launching.pieces(n, tiling.tile)
    if d is not None and d.stride(2) != 1:
        d = d.mT if d.stride(1) == 1 else d.contiguous()  # symmetric: its transpose is itself
    a, b = (x if 1 in x.stride()[1:] else x.contiguous() for x in (a, b))
    a_rows, b_rows = a.stride(2) == 1, b.stride(2) == 1
    x: Any = None
    y: Any = None
    if tiling.described:
        x = described(a if a_rows else a.mT, tiling.tile, tiling.depth, k, rows_are_k=not a_rows)
        y = described(b if b_rows else b.mT, tiling.tile, tiling.depth, k, rows_are_k=b_rows)
    whole = x is not None and y is not None
    settings = (tiling.tile, tiling.depth, tiling.band, k % tiling.depth == 0, whole, a_rows, b_rows)
    addends = (0, 0) if d is None else d.stride()[:2]
    leads = (a.stride(0), a.stride(1 if a_rows else 2), b.stride(0), b.stride(1 if b_rows else 2))
    numbers = (n, k, *leads, *addends)
    added, beta = (out, 0.0) if d is None else (d, float(beta))
    operands = (x if whole else a, y if whole else b, added, out, *numbers, float(alpha), beta, *settings)
    grid = (batch * across * (across + 1) // 2, 1, 1)
    make = partial(compiled, out.device.index, out.dtype, numbers, settings, tiling.warps, tiling.stages)
    launching.launch(half_product, grid, (a, b, added, out), make, operands, num_warps=tiling.warps, num_stages=tiling.stages)


@lru_cache(maxsize=256)
def compiled(
    device: int, dtype: torch.dtype, numbers: tuple[int, ...], settings: tuple[Any, ...], warps: int, stages: int
) -> Any:
    """The compiled kernel for 16-byte aligned tensors on the current ``device``."""
    tile, depth, _, _, whole, a_rows, b_rows = settings
    factors, operands = (1.0, 1.0), (dtype, dtype)
    if whole:  # a descriptor's type is that of its blocks
        like = torch.empty(depth * tile, dtype=dtype, device=torch.device("cuda", device))
        blocks = ([tile, depth] if a_rows else [depth, tile], [depth, tile] if b_rows else [tile, depth])
        operands = tuple(descriptors()(like, block, [block[1], 1], block) for block in blocks)
    arguments = (*operands, dtype, dtype, *numbers, *factors, *settings)
    return half_product.warmup(*arguments, grid=(1, 1, 1), num_warps=warps, num_stages=stages)
