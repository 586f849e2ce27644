# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel of :func:`hbcore.rules.products.parts`: both parts in one pass over the matrix."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def split_kernel(  # type: ignore[no-untyped-def]
    x, out, scale, numel, run, COPIES: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr
):
    """Parts of matrix ``pid1``: its rows of ``run`` elements follow one another ``COPIES`` times; bit ``i`` of ``LOW`` says
    whether copy ``i`` is the low part."""
    item = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    scaled = tl.load(x + item * numel + at, mask=inside, other=0.0) * tl.load(scale + item)
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    to = out + item * numel * COPIES + (at // run).to(tl.int64) * (run * COPIES) + at % run
    for i in tl.static_range(COPIES):
        tl.store(to + i * run, low if (LOW >> i) & 1 else high, mask=inside)


def laid_out(x: Tensor, scale: Tensor, order: str, dim: int) -> Tensor:
    """See :func:`hbcore.rules.products.parts`; ``x`` is contiguous."""
    count, rows, columns = x.shape
    copies, low = len(order), sum(1 << i for i, which in enumerate(order) if which == "l")
    shape = (count, rows * copies, columns) if dim == 1 else (count, rows, columns * copies)
    out = torch.empty(shape, dtype=torch.float16, device=x.device)
    numel = rows * columns
    if count and numel:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # the interpreter takes tensors of the host
            split_kernel[(-(-numel // BLOCK), count)](
                x, out, scale, numel, columns if dim == 2 else numel, copies, low, BLOCK, num_warps=8
            )
    return out
