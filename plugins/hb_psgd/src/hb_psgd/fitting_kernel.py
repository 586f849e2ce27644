# mypy: disable-error-code="untyped-decorator"
"""The Triton kernels of a refresh of Kronecker factors: what lies between its products, each in one launch.

Torch would take four to six launches for each of them, and as many passes over memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbcore.api import launching, triangle

BLOCK = 2048
"""Elements for each program."""

PIECES = 64
"""How many programs share the sum of a block's fourth powers."""

TILE = 64
"""The side of a tile of a symmetric matrix; two of them and their mirrors are held at once."""

row_of = triangle.row_of


@triton.jit
def finite_size(x):  # type: ignore[no-untyped-def]
    """The magnitudes; inf for what is not finite."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def dampened_kernel(g, noise, out, dampening, relative, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``out = g + (dampening + relative |g|) noise``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(g + at, mask=inside, other=0.0)
    drawn = tl.load(noise + at, mask=inside, other=0.0)
    tl.store(out + at, value + (relative * tl.abs(value) + dampening) * drawn, mask=inside)


@triton.jit
def powers_kernel(x, sizes, means, numel, run, PIECES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of piece ``pid0`` of block ``pid1``: its largest magnitude ``m``, inf if one is not finite, and its share of the mean of
    ``(x / m)^4`` over the block."""
    first = tl.program_id(0) * run
    item = tl.program_id(1).to(tl.int64)
    x += item * numel
    most = 0.0
    total = 0.0
    for at in range(0, run, BLOCK):
        index = first + at + tl.arange(0, BLOCK)
        value = tl.load(x + index, mask=(index < numel) & (at + tl.arange(0, BLOCK) < run), other=0.0)
        risen = tl.maximum(most, tl.max(finite_size(value), 0))
        by = tl.where(risen > 0, risen, 1.0)
        shrunk = tl.div_rn(most, by)  # a quotient by more than 2^126 would be 0 otherwise
        ratio = tl.div_rn(value, by)
        total = total * (shrunk * shrunk) * (shrunk * shrunk) + tl.sum((ratio * ratio) * (ratio * ratio), 0)
        most = risen
    tl.store(sizes + item * PIECES + tl.program_id(0), most)
    tl.store(means + item * PIECES + tl.program_id(0), total / numel)


@triton.jit
def scale_kernel(sizes, means, out, dampening, PIECES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale of block ``pid0``, of its pieces: see :func:`hb_psgd.kron.whitening_scale`."""
    each = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    size = tl.load(sizes + each)
    most = tl.max(size, 0)
    known = (most > 0) & (most < float("inf"))
    most = tl.where(known, most, 1.0)
    by = tl.maximum(most, dampening)
    ratio, rest = tl.div_rn(size, by), tl.div_rn(dampening, by)
    total = tl.sum(tl.load(means + each) * (ratio * ratio) * (ratio * ratio), 0) + (rest * rest) * (rest * rest)
    root = tl.sqrt_rn(by)  # the approximate one takes subnormal numbers for 0
    scale = 1 / (root * tl.sqrt(tl.sqrt(tl.sqrt(tl.where(known, total, 1.0)))))
    tl.store(out + tl.program_id(0), tl.where(known, scale, 0.0))


@triton.jit
def moved_kernel(x, q, step, level, part, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x`` becomes ``q (1 + s level) - s x`` with ``s = part step``, for the matrices ``pid1``."""
    item = tl.program_id(1).to(tl.int64)
    s = part * tl.load(step + item)
    keep = 1 + s * tl.load(level + item)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    at = item * numel + at
    tl.store(x + at, tl.load(q + at, mask=inside, other=0.0) * keep - s * tl.load(x + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def mirrored_kernel(x, q, step, level, part, n, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same, and then half of the sum with the transpose: one tile and its mirror, whose memory no other program reads."""
    item = tl.program_id(1).to(tl.int64)
    i = row_of(tl.program_id(0))
    j = tl.program_id(0) - i * (i + 1) // 2
    s = part * tl.load(step + item)
    keep = 1 + s * tl.load(level + item)
    rows, columns = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    here = item * n * n + rows[:, None] * n + columns[None, :]
    there = item * n * n + columns[:, None] * n + rows[None, :]
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    mirrored = (columns < n)[:, None] & (rows < n)[None, :]
    one = tl.load(q + here, mask=inside, other=0.0) * keep - s * tl.load(x + here, mask=inside, other=0.0)
    other = tl.load(q + there, mask=mirrored, other=0.0) * keep - s * tl.load(x + there, mask=mirrored, other=0.0)
    made = 0.5 * (one + tl.trans(other))
    tl.debug_barrier()  # both tiles are read before either is written: on the diagonal they are the same
    tl.store(x + here, made, mask=inside)
    tl.store(x + there, tl.trans(made), mask=mirrored)


@triton.jit
def diagonal_kernel(  # type: ignore[no-untyped-def]
    q, share, bound, first, old, new, risen, lr, beta, level, n,
    HALVES: tl.constexpr, STARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One diagonal factor: begun in ``old`` if it ``STARTS``, fitted in ``new``, and its bound; ``HALVES`` of a step, one after
    the other."""
    item = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    for at in range(0, n, BLOCK):
        value = tl.load(first + item * n + at + each, mask=at + each < n, other=0.0)
        most = tl.maximum(most, finite_size(value))
    norm = tl.max(most, 0) + level
    made = tl.maximum(beta * tl.load(bound + item) + (1 - beta) * norm, norm)
    s = lr / (made * HALVES)
    tl.store(risen + item, made)
    for at in range(0, n, BLOCK):
        index = item * n + at + each
        inside = at + each < n
        value = tl.load(q + index, mask=inside, other=0.0)
        if STARTS:
            value += tl.load(share + item)
            tl.store(old + index, value, mask=inside)
        factor = 1 - s * (tl.load(first + index, mask=inside, other=0.0) - level)
        if HALVES == 2:
            factor = factor * factor
        tl.store(new + index, value * factor, mask=inside)


@triton.jit
def settled_kernel(new, old, share, good, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Factors ``pid1`` times their share, or as they were where that is not good."""
    item = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    at = item * numel + at
    if tl.load(good + item):
        tl.store(new + at, tl.load(new + at, mask=inside, other=0.0) * tl.load(share + item), mask=inside)
    else:
        tl.store(new + at, tl.load(old + at, mask=inside, other=0.0), mask=inside)


def dampened(g: Tensor, noise: Tensor, dampening: float, relative: float) -> Tensor:
    """See :func:`hb_psgd.kron.dampened`."""
    out, grid = torch.empty_like(g), (launching.pieces(g.numel(), BLOCK), 1, 1)
    launching.run(dampened_kernel, grid, (g, noise, out), (dampening, relative), (g.numel(),), (BLOCK,), num_warps=8)
    return out


def whitening_scales(xs: list[Tensor], dampening: float) -> Tensor:
    """See :func:`hb_psgd.kron.whitening_scales`; float32 ``[sum of B]``."""
    counts = [len(x) for x in xs]
    sizes, means = (xs[0].new_empty(sum(counts), PIECES) for _ in range(2))
    for x, own_sizes, own_means in zip(xs, *(torch.split(t, counts) for t in (sizes, means)), strict=True):
        numel = x[0].numel()
        lengths = (numel, launching.pieces(numel, PIECES))
        launching.run(powers_kernel, (PIECES, len(x), 1), (x, own_sizes, own_means), (), lengths, (PIECES, BLOCK), num_warps=8)
    out = sizes.new_empty(len(sizes))
    launching.run(scale_kernel, (len(sizes), 1, 1), (sizes, means, out), (dampening,), (), (PIECES,), num_warps=1)
    return out


def moved(x: Tensor, q: Tensor, step: Tensor, level: Tensor, part: float, mirrored: bool = False) -> Tensor:
    """``x``, overwritten with ``q (1 + s level) - s x`` and perhaps made symmetric; ``[B, n, n]``, ``s = part step``."""
    n = x.shape[-1]
    if not mirrored:
        grid = (launching.pieces(n * n, BLOCK), x.shape[0], 1)
        launching.run(moved_kernel, grid, (x, q, step, level), (part,), (n * n,), (BLOCK,), num_warps=8)
        return x
    across = launching.pieces(n, TILE)
    grid = (across * (across + 1) // 2, x.shape[0], 1)
    launching.run(mirrored_kernel, grid, (x, q, step, level), (part,), (n,), (TILE,), num_warps=8)
    return x


def diagonal(
    q: Tensor, share: Tensor | None, bound: Tensor, first: Tensor, lr: float, beta: float, level: float, halves: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A diagonal factor ``[B, n]`` as it begins, fitted, and its bound ``[B]``."""
    count, n = q.shape
    old = q if share is None else torch.empty_like(q)
    new, risen, starts = torch.empty_like(q), torch.empty_like(bound), share is not None
    tensors = (q, bound if share is None else share, bound, first, old, new, risen)
    constants = (halves, int(starts), min(BLOCK, launching.power_of_two(n)))
    launching.run(diagonal_kernel, (count, 1, 1), tensors, (lr, beta, level), (n,), constants, num_warps=4)
    return old, new, risen


def settled(new: Tensor, old: Tensor, share: Tensor, good: Tensor) -> None:
    """Overwrite fitted factors ``[B, ...]`` by what is stored of them; see :func:`hb_psgd.fitting.settle`."""
    grid, numel = (launching.pieces(new[0].numel(), BLOCK), new.shape[0], 1), new[0].numel()
    launching.run(settled_kernel, grid, (new, old, share, good), (), (numel,), (BLOCK,), num_warps=8)
