# mypy: disable-error-code="untyped-decorator"
"""The Triton kernels of :class:`hbcore.rules.products.Split`: what surrounds its products, in one pass over each matrix."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
PIECES = 64
"""How many programs look for the largest element of a matrix."""
TILE = 32


@triton.jit
def largest_kernel(x, out, numel, run, PIECES: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits of the largest magnitude in piece ``pid0`` of matrix ``pid1``; as integers they order like the numbers."""
    item = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * run
    most = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, run, BLOCK):
        index = first + at + tl.arange(0, BLOCK)
        value = tl.load(x + item * numel + index, mask=(index < numel) & (at + tl.arange(0, BLOCK) < run), other=0.0)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(out + item * PIECES + tl.program_id(0), tl.max(most, 0))


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    x, out, largest, scales, numel, run, PIECES: tl.constexpr, COPIES: tl.constexpr, LOW: tl.constexpr,
    TOP: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Parts of matrix ``pid1``: its rows of ``run`` elements follow one another ``COPIES`` times; bit ``i`` of ``LOW`` says
    whether copy ``i`` is the low part. The scale is a power of two, made of its exponent's bits."""
    item = tl.program_id(1).to(tl.int64)
    most = tl.max(tl.load(largest + item * PIECES + tl.arange(0, PIECES)), 0)
    exponent = tl.minimum(tl.maximum(TOP + 126 - (most >> 23), LEAST), MOST)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(scales + item, scale)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    scaled = tl.load(x + item * numel + at, mask=inside, other=0.0) * scale
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    to = out + item * numel * COPIES + (at // run).to(tl.int64) * (run * COPIES) + at % run
    for i in tl.static_range(COPIES):
        if (LOW >> i) & 1:
            tl.store(to + i * run, low, mask=inside)
        else:
            tl.store(to + i * run, high, mask=inside)


@triton.jit
def combine_kernel(mean, total, scales, out, n, decay, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One tile of :func:`hbcore.rules.products._combined`."""
    item = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    inside = (rows < n) & (columns < n)
    wide = total + item * n * 2 * n
    here = rows * 2 * n + columns
    both = tl.load(wide + here, mask=inside, other=0.0) + tl.load(wide + here + n, mask=inside, other=0.0)
    back_rows = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    back_columns = tl.program_id(0) * TILE + tl.arange(0, TILE)[None, :]
    back = (back_rows < n) & (back_columns < n)
    both += tl.trans(tl.load(wide + back_rows * 2 * n + back_columns + n, mask=back, other=0.0))
    inverse = 1 / tl.load(scales + item)
    at = item * n * n + rows * n + columns
    new = decay * tl.load(mean + at, mask=inside, other=0.0) + both * inverse * inverse * (1 - decay)
    tl.store(out + at, new, mask=inside)


def parts(x: Tensor, order: str, dim: int) -> tuple[Tensor, Tensor]:
    """See :func:`hbcore.rules.products.parts`; ``x`` is contiguous."""
    from hbcore.rules.products import EXPONENT, SCALES

    count, rows, columns = x.shape
    copies, low = len(order), sum(1 << i for i, which in enumerate(order) if which == "l")
    shape = (count, rows * copies, columns) if dim == 1 else (count, rows, columns * copies)
    out, scales = torch.empty(shape, dtype=torch.float16, device=x.device), x.new_ones(count, 1, 1)
    numel = rows * columns
    if not count or not numel:
        return out, scales
    largest = torch.empty(count, PIECES, dtype=torch.int32, device=x.device)
    run = -(-numel // PIECES)
    with on(x.device):
        largest_kernel[(PIECES, count)](x, largest, numel, run, PIECES, BLOCK, num_warps=8)
        split_kernel[(-(-numel // BLOCK), count)](
            x, out, largest, scales, numel, columns if dim == 2 else numel, PIECES, copies, low, EXPONENT, *SCALES, BLOCK,
            num_warps=8,
        )  # fmt: skip
    return out, scales


def combined(mean: Tensor, total: Tensor, scales: Tensor, decay: float) -> Tensor:
    """See :func:`hbcore.rules.products._combined`."""
    mean, n = mean.contiguous(), mean.shape[1]
    out = torch.empty_like(mean)
    tiles = -(-n // TILE)
    if len(mean):
        with on(mean.device):
            combine_kernel[(tiles, tiles, len(mean))](mean, total, scales, out, n, decay, TILE, num_warps=4)
    return out


def on(device: torch.device) -> Any:
    """A context in which ``device`` is the current one; free if it already is."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
