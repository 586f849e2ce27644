# mypy: disable-error-code="untyped-decorator"
"""The Triton kernels of :mod:`hb_muon.passes`, imported on first launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hb_muon.coefficients import Row
from hbcore.api import launching

BLOCK = 4096
WARPS = 8
PARTS = 64
"""The most partial sums of squares per matrix; their readers add them up in a fixed order."""


@triton.jit
def add_squares(sums, x, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of squares of every ``PARTS``-th block of matrix ``pid1``, from block ``pid0`` on."""
    part, matrix = tl.program_id(0), tl.program_id(1)
    x += matrix.to(tl.int64) * numel
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(part * BLOCK, numel, PARTS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < numel, other=0.0).to(tl.float32)
        total += value * value
    tl.store(sums + matrix * PARTS + part, tl.sum(total, 0))


@triton.jit
def norm_of(sums, matrix, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The norm of a matrix from its partial sums of squares."""
    return tl.sqrt(tl.sum(tl.load(sums + matrix * PARTS + tl.arange(0, PARTS)), 0))


@triton.jit
def divide(out, x, sums, least, size, numel, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements ``BLOCK pid0`` on of matrix ``pid1``, which has ``numel``."""
    matrix = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    start = matrix.to(tl.int64) * numel
    factor = size / tl.maximum(norm_of(sums, matrix, PARTS), least)
    value = tl.load(x + start + at, mask=inside).to(tl.float32) * factor
    tl.store(out + start + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def begin(  # type: ignore[no-untyped-def]
    q, gram, square, sums, least, a, b, c, side, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Elements ``BLOCK pid0`` on of matrix ``pid1``, which has ``side`` rows."""
    matrix = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < side * side
    start = matrix.to(tl.int64) * side * side
    scale = 1 / tl.sqrt(tl.maximum(norm_of(sums, matrix, PARTS), least))  # 1 / nu
    r = tl.load(gram + start + at, mask=inside).to(tl.float32) * scale
    z = b * r + c * (tl.load(square + start + at, mask=inside).to(tl.float32) * (scale * scale))
    first = tl.where(at // side == at % side, a + z, z) * tl.sqrt(scale)
    tl.store(gram + start + at, r.to(q.dtype.element_ty), mask=inside)
    tl.store(square + start + at, z.to(q.dtype.element_ty), mask=inside)
    tl.store(q + start + at, first.to(q.dtype.element_ty), mask=inside)


def launch_divide(out: Tensor, x: Tensor, least: float, size: float) -> None:
    """Fill ``out`` ``[B, m, n]``, contiguous like ``x``, with ``size x / max(norm of x, least)``."""
    _over_blocks(divide, (out, x, sums_of(x)), (least, size), x.shape[1] * x.shape[2])


def launch_begin(q: Tensor, gram: Tensor, square: Tensor, least: float, row: Row) -> None:
    """Fill ``q`` ``[B, k, k]``, and overwrite ``gram`` and ``square``, all contiguous and of one dtype."""
    _over_blocks(begin, (q, gram, square, sums_of(square)), (least, *row), q.shape[1])


def sums_of(x: Tensor) -> Tensor:
    """Sums of the squares of each matrix of ``x`` ``[B, m, n]``, contiguous: ``[B, parts]`` in float32."""
    numel = x.shape[1] * x.shape[2]
    parts = min(PARTS, launching.power_of_two(launching.pieces(numel, BLOCK)))
    sums = torch.empty(len(x), parts, dtype=torch.float32, device=x.device)
    launching.run(add_squares, (parts, len(x), 1), (sums, x), sizes=(numel,), constants=(parts, BLOCK), num_warps=WARPS)
    return sums


def _over_blocks(kernel: Any, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], size: int) -> None:
    """Run a kernel over the first of ``tensors``; the last one holds sums. ``size`` is passed after the ``numbers``."""
    out, parts = tensors[0], tensors[-1].shape[1]
    grid = (launching.pieces(out.shape[1] * out.shape[2], BLOCK), out.shape[0], 1)
    launching.run(kernel, grid, tensors, numbers, (size,), (parts, BLOCK), WARPS)
