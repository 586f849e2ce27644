# mypy: disable-error-code="untyped-decorator"
"""The Triton kernels of :class:`hbcore.rules.products.Split`: what surrounds its products, in one pass over each matrix."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbcore.rules.launching import pieces, run
from hbcore.rules.parts import EXPONENTS, Layout, Parts

BLOCK = 2048
"""Elements for each program."""

PIECES = 64
"""How many programs look for the largest element of a matrix."""


NUMBERS, HALVES = 4, 8
"""What begins at a multiple of so many float32 or float16 numbers is where compiled kernels expect it."""


@triton.jit
def largest_of(x, out, numel, run, PIECES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest magnitude in one piece of a matrix, NaN above all; as integers, magnitudes order like the numbers."""
    first = tl.program_id(0) * run
    most = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, run, BLOCK):
        index = first + at + tl.arange(0, BLOCK)
        value = tl.load(x + index, mask=(index < numel) & (at + tl.arange(0, BLOCK) < run), other=0.0)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(out + tl.program_id(0), tl.max(most, 0).to(tl.float32, bitcast=True))


@triton.jit
def largest_kernel(  # type: ignore[no-untyped-def]
    a, b, numbers, numel_a, run_a, numel_b, run_b, count, start, PIECES: tl.constexpr, BLOCK: tl.constexpr
):
    """:func:`largest_of` for piece ``pid0`` of matrix ``pid1``, ``count`` of which are ``a``'s and the others ``b``'s; they
    begin at ``start``."""
    item = tl.program_id(1).to(tl.int64)
    out = numbers + start + item * PIECES
    if item < count:
        largest_of(a + item * numel_a, out, numel_a, run_a, PIECES, BLOCK)
    else:
        largest_of(b + (item - count) * numel_b, out, numel_b, run_b, PIECES, BLOCK)


@triton.jit
def scale_of(largest, PIECES: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    """A power of two, made of its exponent's bits."""
    most = tl.max(tl.load(largest + tl.arange(0, PIECES)).to(tl.int32, bitcast=True), 0)
    exponent = tl.minimum(tl.maximum(TOP + 126 - (most >> 23), LEAST), MOST)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def split_one(x, out, scale, numel, run, LOW_FIRST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of a matrix in parts: after ``run`` elements of one come those of the other."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    scaled = tl.load(x + at, mask=inside, other=0.0) * scale
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    to = out + (at // run).to(tl.int64) * (run * 2) + at % run
    if LOW_FIRST:
        tl.store(to, low, mask=inside)
        tl.store(to + run, high, mask=inside)
    else:
        tl.store(to, high, mask=inside)
        tl.store(to + run, low, mask=inside)


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    a, b, out_a, out_b, numbers, numel_a, run_a, numel_b, run_b, count, first_b, scales_b, start, PIECES: tl.constexpr,
    LOW_A: tl.constexpr, LOW_B: tl.constexpr, TOP: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """:func:`split_one` for matrix ``pid1``, ``count`` of which are ``a``'s and the others ``b``'s, whose parts begin at
    ``first_b``; and the scales, those of ``b`` from ``scales_b`` on. The largest magnitudes begin at ``start``."""
    item = tl.program_id(1).to(tl.int64)
    scale = scale_of(numbers + start + item * PIECES, PIECES, TOP, LEAST, MOST)
    if tl.program_id(0) == 0:
        tl.store(numbers + tl.where(item < count, item, item - count + scales_b), scale)
    if item < count:
        split_one(a + item * numel_a, out_a + item * numel_a * 2, scale, numel_a, run_a, LOW_A, BLOCK)
    else:
        item -= count
        split_one(b + item * numel_b, out_b + first_b + item * numel_b * 2, scale, numel_b, run_b, LOW_B, BLOCK)


@triton.jit
def unscale_kernel(  # type: ignore[no-untyped-def]
    total, one, other, weights, out, numel, width, first_one, first_other,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Divide a product by the scales of its factors, and multiply its rows or columns, of which there are ``width``, by
    weights.

    By two powers of two, of half the exponent each: the scales' product may be outside float32's range.
    """
    item = tl.program_id(1).to(tl.int64)
    first = (tl.load(one + first_one + item).to(tl.int32, bitcast=True) >> 23) - 127
    second = (tl.load(other + first_other + item).to(tl.int32, bitcast=True) >> 23) - 127
    half = (-first - second) >> 1
    lower = ((half + 127) << 23).to(tl.float32, bitcast=True)
    upper = ((-first - second - half + 127) << 23).to(tl.float32, bitcast=True)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    value = tl.load(total + item * numel + at, mask=inside) * lower * upper
    if ROWS:
        value *= tl.load(weights + item * (numel // width) + at // width, mask=inside)
    if COLUMNS:
        value *= tl.load(weights + item * width + at % width, mask=inside)
    tl.store(out + item * numel + at, value, mask=inside)


def split(stacks: Sequence[Tensor], layouts: tuple[Layout, ...], together: bool = False) -> list[Parts]:
    """The parts of one stack or two, of as many matrices.

    Args:
        stacks: contiguous, float32 ``[B, m, n]``.
        layouts: of each.
        together: their parts share memory.
    """
    a, b = stacks[0], stacks[-1]
    plan = _plan(a.shape, b.shape if len(stacks) > 1 else None, layouts)
    first = plan.second if together else 0
    memory = torch.empty(2 * a.numel() if first == 0 else plan.both, dtype=torch.float16, device=a.device)
    other = memory if first or len(stacks) == 1 else torch.empty(2 * b.numel(), dtype=torch.float16, device=a.device)
    numbers = torch.empty(plan.numbers, dtype=torch.float32, device=a.device)
    run(largest_kernel, (PIECES, plan.items, 1), (a, b, numbers), (), plan.lengths, (PIECES, BLOCK), num_warps=8)
    sizes = (*plan.sizes, first, plan.scales, plan.start)
    run(split_kernel, plan.grid, (a, b, memory, other, numbers), (), sizes, plan.constants, num_warps=8)
    made = [Parts(memory, 0, numbers, 0, layouts[0])]
    return made if len(stacks) == 1 else [*made, Parts(other, first, numbers, plan.scales, layouts[1])]


class Plan(NamedTuple):
    """What :func:`split` launches for stacks of some shapes.

    Attributes:
        items: how many matrices there are in all.
        second, both: in memory for both stacks, where the second one's parts begin, and its size.
        scales, start, numbers: where the second stack's scales begin and the largest magnitudes, and how many numbers all are.
        lengths, sizes, constants: of the kernels' arguments.
        grid: of the kernel that splits.
    """

    items: int
    second: int
    both: int
    scales: int
    start: int
    numbers: int
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    constants: tuple[int, ...]
    grid: tuple[int, int, int]


@lru_cache(maxsize=512)
def _plan(a: torch.Size, b: torch.Size | None, layouts: tuple[Layout, ...]) -> Plan:
    """For one stack, or two; a step asks for the same each time, and needs its host for launching."""
    count, stacks = a[0], (a,) if b is None else (a, b)
    numels = [rows * columns for _, rows, columns in stacks]
    items, scales = count * len(stacks), _aligned(count, NUMBERS)
    start = scales * len(stacks)
    second = _aligned(2 * count * numels[0], HALVES)
    return Plan(
        items=items,
        second=second,
        both=second + 2 * count * numels[-1],
        scales=scales,
        start=start,
        numbers=start + items * PIECES,
        lengths=(numels[0], pieces(numels[0], PIECES), numels[-1], pieces(numels[-1], PIECES), count, start),
        sizes=(numels[0], layouts[0].run, numels[-1], layouts[-1].run, count),
        constants=(PIECES, int(layouts[0].low_first), int(layouts[-1].low_first), *EXPONENTS, BLOCK),
        grid=(pieces(max(numels), BLOCK), items, 1),
    )


def _aligned(count: int, to: int) -> int:
    """``count``, or the next multiple of ``to``."""
    return pieces(count, to) * to


def unscale(
    total: Tensor, one: Parts, other: Parts, out: Tensor, weights: Tensor | None = None, of_columns: bool = False
) -> Tensor:
    """``out``, with ``total`` ``[B, m, n]`` divided by the scales of both factors; it may be ``total``'s own memory.

    Its rows are multiplied by weights ``[B, m]``, or its columns by ``[B, n]``.
    """
    count, rows, columns = total.shape
    tensors = (total, one.numbers, other.numbers, out if weights is None else weights.contiguous(), out)
    sizes = (rows * columns, columns, one.first_scale, other.first_scale)
    how = (int(weights is not None and not of_columns), int(weights is not None and of_columns), BLOCK)
    run(unscale_kernel, (pieces(rows * columns, BLOCK), count, 1), tensors, (), sizes, how, num_warps=8)
    return out
