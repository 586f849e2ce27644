# mypy: disable-error-code="untyped-decorator"
"""The Triton kernels of :class:`hbcore.rules.products.Split`: what surrounds its products, in one pass over each matrix."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbcore.rules.launching import pieces, run

BLOCK = 2048
"""Elements for each program."""

PIECES = 64
"""How many programs look for the largest element of a matrix."""


ALIGNED = 4
"""The scales of a second stack begin at a multiple of this, where compiled kernels expect them."""


@triton.jit
def largest_of(x, out, numel, run, PIECES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of the largest magnitude in one piece of a matrix; as integers they order like the numbers."""
    first = tl.program_id(0) * run
    most = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, run, BLOCK):
        index = first + at + tl.arange(0, BLOCK)
        value = tl.load(x + index, mask=(index < numel) & (at + tl.arange(0, BLOCK) < run), other=0.0)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(out + tl.program_id(0), tl.max(most, 0))


@triton.jit
def largest_kernel(  # type: ignore[no-untyped-def]
    a, b, out, numel_a, run_a, numel_b, run_b, count, PIECES: tl.constexpr, BLOCK: tl.constexpr
):
    """:func:`largest_of` for piece ``pid0`` of matrix ``pid1``, ``count`` of which are ``a``'s and the others ``b``'s."""
    item = tl.program_id(1).to(tl.int64)
    if item < count:
        largest_of(a + item * numel_a, out + item * PIECES, numel_a, run_a, PIECES, BLOCK)
    else:
        largest_of(b + (item - count) * numel_b, out + item * PIECES, numel_b, run_b, PIECES, BLOCK)


@triton.jit
def scale_of(largest, item, PIECES: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """A power of two, made of its exponent's bits."""
    most = tl.max(tl.load(largest + item * PIECES + tl.arange(0, PIECES)), 0)
    exponent = tl.minimum(tl.maximum(TOP + 126 - (most >> 23), LEAST), MOST)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_one(x, out, scale, numel, run, COPIES: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of a matrix in parts: its rows of ``run`` elements follow one another ``COPIES`` times; bit ``i`` of ``LOW``
    says whether copy ``i`` is the low part."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    scaled = tl.load(x + at, mask=inside, other=0.0) * scale
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    to = out + (at // run).to(tl.int64) * (run * COPIES) + at % run
    for i in tl.static_range(COPIES):
        if (LOW >> i) & 1:
            tl.store(to + i * run, low, mask=inside)
        else:
            tl.store(to + i * run, high, mask=inside)


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    a, b, out_a, out_b, largest, scales, numel_a, run_a, numel_b, run_b, count, gap, PIECES: tl.constexpr,
    COPIES: tl.constexpr, LOW_A: tl.constexpr, LOW_B: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """:func:`split_one` for matrix ``pid1``, ``count`` of which are ``a``'s and the others ``b``'s; and its scale, those of
    ``b`` after a gap."""
    item = tl.program_id(1).to(tl.int64)
    scale = scale_of(largest, item, PIECES, TOP, LEAST, MOST)
    if tl.program_id(0) == 0:
        tl.store(scales + tl.where(item < count, item, item + gap), scale)
    if item < count:
        split_one(a + item * numel_a, out_a + item * numel_a * COPIES, scale, numel_a, run_a, COPIES, LOW_A, BLOCK)
    else:
        item -= count
        split_one(b + item * numel_b, out_b + item * numel_b * COPIES, scale, numel_b, run_b, COPIES, LOW_B, BLOCK)


@triton.jit
def unscale_kernel(total, one_scale, other_scale, out, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Divide a product by the scales of its factors.

    By two powers of two, of half the exponent each: the scales' product may be outside float32's range.
    """
    item = tl.program_id(1).to(tl.int64)
    first = (tl.load(one_scale + item).to(tl.int32, bitcast=True) >> 23) - 127
    second = (tl.load(other_scale + item).to(tl.int32, bitcast=True) >> 23) - 127
    half = (-first - second) >> 1
    one = ((half + 127) << 23).to(tl.float32, bitcast=True)
    other = ((-first - second - half + 127) << 23).to(tl.float32, bitcast=True)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    tl.store(out + item * numel + at, tl.load(total + item * numel + at, mask=inside) * one * other, mask=inside)


def parts(
    a: Tensor, b: Tensor, orders: tuple[str, str], dims: tuple[int, int], exponents: tuple[int, int, int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The parts of two stacks of as many matrices, see :func:`hbcore.rules.halves.parts`, and the scales of each, ``[B]``.

    Args:
        a, b: contiguous; the same tensor if one is to be split alone, whose parts are returned twice.
        orders, dims: of each.
        exponents: see :data:`hbcore.rules.halves.EXPONENTS`.
    """
    plan = _plan(a.shape, None if a is b else b.shape, orders, dims, exponents)
    outs = [torch.empty(shape, dtype=torch.float16, device=a.device) for shape in plan.shapes]
    scales = torch.empty(plan.items + plan.gap, dtype=torch.float32, device=a.device)
    largest = torch.empty(plan.items, PIECES, dtype=torch.int32, device=a.device)
    run(largest_kernel, (PIECES, plan.items, 1), (a, b, largest), (), plan.lengths, (PIECES, BLOCK), num_warps=8)
    tensors = (a, b, outs[0], outs[-1], largest, scales)
    run(split_kernel, plan.grid, tensors, (), plan.sizes, plan.constants, num_warps=8)
    return (outs[0], outs[-1]), (scales[: len(a)], scales[-len(a) :])


class Plan(NamedTuple):
    """What :func:`parts` launches for stacks of some shapes.

    Attributes:
        shapes: of the parts of each stack.
        items: how many matrices there are in all.
        gap: how many numbers are between the scales of both.
        lengths, sizes, constants: of the kernels' arguments.
        grid: of the kernel that splits.
    """

    shapes: tuple[tuple[int, ...], ...]
    items: int
    gap: int
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    constants: tuple[int, ...]
    grid: tuple[int, int, int]


@lru_cache(maxsize=512)
def _plan(
    a: torch.Size, b: torch.Size | None, orders: tuple[str, str], dims: tuple[int, int], exponents: tuple[int, int, int]
) -> Plan:
    """For one stack, or two; a step asks for the same each time, and needs its host for launching."""
    shapes, runs, lows, numels = [], [], [], []
    for (count, rows, columns), order, dim in zip((a,) if b is None else (a, b), orders, dims, strict=False):
        copies = len(order)
        shapes.append((count, rows * copies, columns) if dim == 1 else (count, rows, columns * copies))
        runs.append(columns if dim == 2 else rows * columns)
        lows.append(sum(1 << i for i, which in enumerate(order) if which == "l"))
        numels.append(rows * columns)
    count = a[0]
    items, gap = count * len(shapes), -count % ALIGNED
    return Plan(
        shapes=tuple(shapes),
        items=items,
        gap=gap,
        lengths=(numels[0], pieces(numels[0], PIECES), numels[-1], pieces(numels[-1], PIECES), count),
        sizes=(numels[0], runs[0], numels[-1], runs[-1], count, gap),
        constants=(PIECES, len(orders[0]), lows[0], lows[-1], *exponents, BLOCK),
        grid=(pieces(max(numels), BLOCK), items, 1),
    )


def unscale(total: Tensor, one_scale: Tensor, other_scale: Tensor, out: Tensor) -> Tensor:
    """``out``, with ``total`` ``[B, m, n]`` divided by the scales ``[B]`` of both factors. It may be ``total``'s own memory."""
    numel = total.shape[1] * total.shape[2]
    tensors = (total, one_scale, other_scale, out)
    run(unscale_kernel, (pieces(numel, BLOCK), len(total), 1), tensors, (), (numel,), (BLOCK,), num_warps=8)
    return out
