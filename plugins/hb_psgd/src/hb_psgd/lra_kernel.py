# mypy: disable-error-code="untyped-decorator"
"""The Triton kernels of :mod:`hb_psgd.lra_passes`: each reads ``[N, r]`` once, as memory has it.

A library fills a sixth of a tile with so narrow a matrix at best, and leaves most of a GPU idle where the result is r x r.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hb_psgd import lra_moments
from hbcore.api import launching

LINE = 1024
"""How many elements of vectors alone a program takes."""

PROGRAMS = 1024
"""How many programs share a sum over all rows; each leaves a part, and torch adds those in order."""

THIN, THIN_PROGRAMS = 32, 8192
"""The rows of a tile, and the programs, for products of r columns with r columns: one warp each. Four warps would share 256
results, and take three times as long."""


@triton.jit
def tile_of(a, first, numel, R: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``ROWS`` rows of a matrix, zeros beyond its ``numel`` rows and ``R`` columns."""
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, PAD)
    inside = (rows < numel)[:, None] & (columns < R)[None, :]
    return tl.load(a + rows.to(tl.int64)[:, None] * R + columns[None, :], mask=inside, other=0.0)


@triton.jit
def plus_kernel(  # type: ignore[no-untyped-def]
    x, a, c, d, out, numel, R: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr
):
    """``out = d (x + A c)``."""
    first = tl.program_id(0) * ROWS
    rows, columns = first + tl.arange(0, ROWS), tl.arange(0, PAD)
    weights = tl.load(c + columns, mask=columns < R, other=0.0)
    moved = tl.sum(tile_of(a, first, numel, R, PAD, ROWS) * weights[None, :], 1)
    value = (tl.load(x + rows, mask=rows < numel, other=0.0) + moved) * tl.load(d + rows, mask=rows < numel, other=0.0)
    tl.store(out + rows, value, mask=rows < numel)


@triton.jit
def size_of(x):  # type: ignore[no-untyped-def]
    """The largest magnitude; inf if one is not finite."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")), 0)


@triton.jit
def pair_kernel(t, probe, d, x, y, sizes, dampening, relative, numel, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x`` is d times the dampened t, ``y`` is v / d; what is not finite is stored as 0."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < numel
    value = tl.load(t + rows, mask=inside, other=0.0)
    noise = tl.load(probe + rows, mask=inside, other=0.0)
    scale = tl.load(d + rows, mask=inside, other=0.0)
    left = scale * (value + (relative * tl.abs(value) + dampening) * noise)
    right = tl.where(scale > 0, noise / tl.where(scale > 0, scale, 1.0), 0.0)
    tl.store(x + rows, tl.where(tl.abs(left) < float("inf"), left, 0.0), mask=inside)
    tl.store(y + rows, tl.where(tl.abs(right) < float("inf"), right, 0.0), mask=inside)
    place = sizes + tl.program_id(0) * 3
    tl.store(place, size_of(value))
    tl.store(place + 1, size_of(left))
    tl.store(place + 2, size_of(right))


@triton.jit
def grown_kernel(d, gap, one, by, out, numel, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """``out = d (one + by gap)``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < numel
    factor = tl.load(one) + tl.load(by) * tl.load(gap + rows, mask=inside, other=0.0)
    tl.store(out + rows, factor * tl.load(d + rows, mask=inside, other=0.0), mask=inside)


@triton.jit
def ends_kernel(  # type: ignore[no-untyped-def]
    u, v, x, y, scale, of_u, of_v, first, second, gap, sizes, squares, numel,
    R: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, ON_U: tl.constexpr,
):  # fmt: skip
    """See :func:`hb_psgd.lra_passes.ends`; ``of_u`` is ``u_x`` and ``u_y``, ``of_v`` is ``v_x`` and ``v_y``."""
    start = tl.program_id(0) * ROWS
    rows, columns = start + tl.arange(0, ROWS), tl.arange(0, PAD)
    inside, known = rows < numel, columns < R
    p = tile_of(u, start, numel, R, PAD, ROWS)
    q = tile_of(v, start, numel, R, PAD, ROWS)
    by = tl.load(scale)
    left = tl.load(x + rows, mask=inside, other=0.0) * by
    right = tl.load(y + rows, mask=inside, other=0.0) * by
    a = left + tl.sum(p * tl.load(of_u + columns, mask=known, other=0.0)[None, :], 1)
    b = right - tl.sum(q * tl.load(of_v + R + columns, mask=known, other=0.0)[None, :], 1)
    lifted = a + tl.sum(q * tl.load(of_v + columns, mask=known, other=0.0)[None, :], 1)
    rest = b - tl.sum(p * tl.load(of_u + R + columns, mask=known, other=0.0)[None, :], 1)
    gain, loss = lifted * left, rest * right
    if ON_U:
        tl.store(first + rows, a, mask=inside)
        tl.store(second + rows, b, mask=inside)
    else:
        tl.store(first + rows, lifted, mask=inside)
        tl.store(second + rows, right, mask=inside)
    tl.store(gap + rows, gain - loss, mask=inside)
    tl.store(sizes + tl.program_id(0) * 2, size_of(gain))
    tl.store(sizes + tl.program_id(0) * 2 + 1, size_of(loss))
    a, b = a.to(tl.float64), b.to(tl.float64)  # after a gradient of 1e25 one is 1e-25 of the other
    tl.store(squares + tl.program_id(0) * 2, tl.sum(a * a, 0))
    tl.store(squares + tl.program_id(0) * 2 + 1, tl.sum(b * b, 0))


@triton.jit
def moments_kernel(  # type: ignore[no-untyped-def]
    u, v, x, y, grams, vectors, numel, share, R: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr
):
    """The program's share of the products of U and V with each other, and with x and y."""
    uu = tl.zeros((PAD, PAD), dtype=tl.float32)
    vv = tl.zeros((PAD, PAD), dtype=tl.float32)
    vu = tl.zeros((PAD, PAD), dtype=tl.float32)
    ux = tl.zeros((PAD,), dtype=tl.float32)
    vx = tl.zeros((PAD,), dtype=tl.float32)
    uy = tl.zeros((PAD,), dtype=tl.float32)
    vy = tl.zeros((PAD,), dtype=tl.float32)
    start = tl.program_id(0) * share
    for at in range(0, share, ROWS):
        rows = start + at + tl.arange(0, ROWS)
        p = tile_of(u, start + at, numel, R, PAD, ROWS)
        q = tile_of(v, start + at, numel, R, PAD, ROWS)
        left = tl.load(x + rows, mask=rows < numel, other=0.0)[:, None]
        right = tl.load(y + rows, mask=rows < numel, other=0.0)[:, None]
        uu += tl.dot(tl.trans(p), p, input_precision="ieee")
        vv += tl.dot(tl.trans(q), q, input_precision="ieee")
        vu += tl.dot(tl.trans(q), p, input_precision="ieee")
        ux += tl.sum(p * left, 0)
        vx += tl.sum(q * left, 0)
        uy += tl.sum(p * right, 0)
        vy += tl.sum(q * right, 0)
    each = tl.arange(0, PAD)
    square = grams + tl.program_id(0) * 3 * PAD * PAD + each[:, None] * PAD + each[None, :]
    tl.store(square, uu)
    tl.store(square + PAD * PAD, vv)
    tl.store(square + 2 * PAD * PAD, vu)
    line = vectors + tl.program_id(0) * 4 * PAD + each
    tl.store(line, ux)
    tl.store(line + PAD, vx)
    tl.store(line + 2 * PAD, uy)
    tl.store(line + 3 * PAD, vy)


def plus(x: Tensor, a: Tensor, c: Tensor, d: Tensor, out: Tensor | None) -> Tensor:
    """See :func:`hb_psgd.lra_passes.plus`."""
    r, pad, rows = sizes_of(a)
    out = torch.empty_like(x) if out is None else out
    grid, tensors = (launching.pieces(len(a), rows), 1, 1), (x, a, c.contiguous(), d, out)
    launching.run(plus_kernel, grid, tensors, sizes=(len(a),), constants=(r, pad, rows))
    return out


def pair(
    t: Tensor, probe: Tensor, d: Tensor, dampening: float, relative: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """See :func:`hb_psgd.lra_passes.pair`."""
    grid = (launching.pieces(len(t), LINE), 1, 1)
    x, y, sizes = torch.empty_like(t), torch.empty_like(t), t.new_empty(grid[0], 3)
    tensors, numbers = (t, probe, d, x, y, sizes), (float(dampening), float(relative))
    launching.run(pair_kernel, grid, tensors, numbers=numbers, sizes=(len(t),), constants=(LINE,))
    first, second, third = sizes.amax(0).unbind()
    return x, y, (first, second, third)


def grown(d: Tensor, gap: Tensor, one: Tensor, by: Tensor, out: Tensor | None) -> Tensor:
    """See :func:`hb_psgd.lra_passes.grown`."""
    out = torch.empty_like(d) if out is None else out
    launching.run(
        grown_kernel, (launching.pieces(len(d), LINE), 1, 1), (d, gap, one, by, out), sizes=(len(d),), constants=(LINE,)
    )
    return out


def ends(
    u: Tensor, v: Tensor, x: Tensor, y: Tensor, scale: Tensor, on_u: bool, of_u: Tensor, of_v: Tensor
) -> tuple[Tensor, ...]:
    """See :func:`hb_psgd.lra_passes.ends`; ``of_u`` and ``of_v`` are ``[2, r]``."""
    r, pad, rows = sizes_of(u)
    grid = (launching.pieces(len(u), rows), 1, 1)
    first, gap = torch.empty_like(x), torch.empty_like(x)
    second = torch.empty_like(x) if on_u else y  # overwritten: each vector counts
    sizes, squares = x.new_empty(grid[0], 2), x.new_empty(grid[0], 2, dtype=torch.float64)
    tensors = (u, v, x, y, scale, of_u, of_v, first, second, gap, sizes, squares)
    launching.run(ends_kernel, grid, tensors, sizes=(len(u),), constants=(r, pad, rows, int(on_u)), num_warps=2)
    gain, loss = sizes.amax(0).unbind()
    return first, second, gap, gain, loss, squares.sum(0)


def moments(u: Tensor, v: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    """U^T U, V^T V, V^T U, U^T x, V^T x, U^T y and V^T y, summed over the programs in float64."""
    r, pad, rows = sizes_of(u)
    if r <= lra_moments.WIDEST:
        whole = lra_moments.grams(u, v, x, y, THIN_PROGRAMS if r < 16 else PROGRAMS)
        uu, vv, vu = whole[:r, :r], whole[r : 2 * r, r : 2 * r], whole[r : 2 * r, :r]
        return [uu, vv, vu, whole[:r, 2 * r], whole[r : 2 * r, 2 * r], whole[:r, 2 * r + 1], whole[r : 2 * r, 2 * r + 1]]
    rows = min(rows, THIN)
    programs, share = shares_of(len(u), rows, THIN_PROGRAMS)
    grams, vectors = u.new_empty(programs, 3, pad, pad), u.new_empty(programs, 4, pad)
    tensors = (u, v, x, y, grams, vectors)
    warps = 1 if pad == 16 else 4
    launching.run(moments_kernel, (programs, 1, 1), tensors, sizes=(len(u), share), constants=(r, pad, rows), num_warps=warps)
    squares, lines = grams.sum(0, dtype=torch.float64)[:, :r, :r], vectors.sum(0, dtype=torch.float64)[:, :r]
    return [*squares.unbind(), *lines.unbind()]


def sizes_of(a: Tensor) -> tuple[int, int, int]:
    """The rank, the width of a tile, and its rows: 4096 elements, 32 for each thread."""
    pad = max(16, launching.power_of_two(a.shape[1]))
    return a.shape[1], pad, 4096 // pad


def shares_of(n: int, rows: int, most: int = PROGRAMS) -> tuple[int, int]:
    """How many programs share ``n`` rows, and how many each has: whole tiles."""
    tiles = launching.pieces(n, rows)
    share = launching.pieces(tiles, most)
    return launching.pieces(tiles, share), share * rows
