# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel of :mod:`hb_muon.rescale`. Imported where it is launched."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@triton.jit
def rescale(out, x, factor, numel, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements ``BLOCK pid0`` on of matrix ``pid1``, which has ``numel``."""
    matrix = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    start = matrix.to(tl.int64) * numel
    value = tl.load(x + start + at, mask=inside).to(tl.float32) * tl.load(factor + matrix)
    tl.store(out + start + at, value.to(out.dtype.element_ty), mask=inside)


def launch(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """Fill ``out`` ``[B, m, n]``, contiguous as ``x`` is, with ``x factor``; ``factor`` has one float32 for each matrix."""
    numel, factor = x.shape[1] * x.shape[2], factor.contiguous()
    grid = (triton.cdiv(numel, BLOCK), x.shape[0], 1)
    if INTERPRETED or any(t.data_ptr() % 16 for t in (out, x, factor)):
        rescale[grid](out, x, factor, numel, BLOCK, num_warps=WARPS)
        return
    with torch.cuda.device(out.device):
        compiled(out.device.index, out.dtype, x.dtype, numel)[grid](out, x, factor, numel, BLOCK)


@lru_cache(maxsize=256)
def compiled(device: int, out: torch.dtype, x: torch.dtype, numel: int) -> Any:
    """The kernel for tensors that are aligned to 16 bytes: launching it by itself takes a fifth of the time."""
    return rescale.warmup(out, x, torch.float32, numel, BLOCK, grid=(1, 1, 1), num_warps=WARPS)
