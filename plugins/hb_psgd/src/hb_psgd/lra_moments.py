# mypy: disable-error-code="untyped-decorator"
r"""The Triton kernel of a low-rank preconditioner's moments: one product of :math:`W = [U\, V\, x\, y]` with itself.

On tensor cores each number is two of TF32, :math:`W = H + L` to within :math:`2^{-22}` of it. By symmetry two products will do,

.. math:: W^T W = H^T H + H^T L + (H^T L)^T + O(2^{-22}),

where a library that is handed two matrices takes three. :math:`H^T H` of each tile is added to the others in float32: tensor
cores drop bits from long sums.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hbcore.api import launching

WIDEST = 31
"""The largest rank whose W has 64 columns at most: more do not fit in a program's registers."""


@triton.jit
def in_tf32(x):  # type: ignore[no-untyped-def]
    """float32 rounded to the ten bits of mantissa that TF32 has. NaN may become 0, but what is left of it is still NaN."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def gram_kernel(  # type: ignore[no-untyped-def]
    u, v, x, y, out, numel, share, R: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """The program's share of W^T W, ``[PAD, PAD]``; with ``PARTS`` by tensor cores."""
    total = tl.zeros((PAD, PAD), dtype=tl.float32)
    mixed = tl.zeros((PAD, PAD), dtype=tl.float32)
    start = tl.program_id(0) * share
    columns = tl.arange(0, PAD)
    ends = tl.where(columns == 2 * R, x + columns * 0, y + columns * 0)
    base = tl.where(columns < R, u + columns, tl.where(columns < 2 * R, v + (columns - R), ends))
    width = tl.where(columns < 2 * R, R, 1).to(tl.int64)
    known = columns < 2 * R + 2
    for at in range(0, share, ROWS):
        rows = start + at + tl.arange(0, ROWS)
        inside = (rows < numel)[:, None] & known[None, :]
        w = tl.load(base[None, :] + rows.to(tl.int64)[:, None] * width[None, :], mask=inside, other=0.0)
        if PARTS:
            high = in_tf32(w)
            low = w - high
            turned = tl.trans(high)
            total += tl.dot(turned, high, input_precision="tf32")
            mixed = tl.dot(turned, low, mixed, input_precision="tf32")
        else:
            total += tl.dot(tl.trans(w), w, input_precision="ieee")
    total += mixed + tl.trans(mixed)
    square = out + tl.program_id(0) * PAD * PAD + columns[:, None] * PAD + columns[None, :]
    tl.store(square, total)


def grams(u: Tensor, v: Tensor, x: Tensor, y: Tensor, programs: int, parts: bool | None = None) -> Tensor:
    """W^T W, ``[2r + 2, 2r + 2]`` in float64, summed by at most so many programs; ``parts``: on tensor cores, by default where
    there are some."""
    r, n = u.shape[1], len(u)
    pad = max(16, launching.power_of_two(2 * r + 2))
    rows, warps = (64, 4) if pad == 64 else (32, 1)
    share = launching.pieces(launching.pieces(n, rows), programs) * rows
    out = u.new_empty(launching.pieces(n, share), pad, pad)
    parts = has_tf32(u.device) if parts is None else parts
    constants = (r, pad, rows, int(parts))
    launching.run(gram_kernel, (len(out), 1, 1), (u, v, x, y, out), sizes=(n, share), constants=constants, num_warps=warps)
    return out.sum(0, dtype=torch.float64)[: 2 * r + 2, : 2 * r + 2]


@lru_cache(maxsize=64)
def has_tf32(device: torch.device) -> bool:
    """Whether Triton multiplies TF32 on a device; its interpreter does on any."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
