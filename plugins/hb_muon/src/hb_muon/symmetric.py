r"""Products of matrices whose result is symmetric, with half of the work where that is faster.

The products :math:`X X^T`, and :math:`A B` of two symmetric matrices that commute, as polynomials of one matrix do, are
symmetric. :func:`half_and_mirror` computes only the tiles on and below the diagonal and writes each of them twice.
:func:`symmetric_product` uses it where it measured faster, and :func:`torch.baddbmm` everywhere else.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """How the kernel divides its work.

    Attributes:
        tile: the side of a tile of the result.
        depth: how much of the inner dimension is in fast memory at once.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        described: read through tensor descriptors (TMA) where the stacks allow it, by pointers otherwise.
        band: how many rows of tiles are walked together.
    """

    tile: int = 128
    depth: int = 64
    warps: int = 8
    stages: int = 3
    described: bool = False
    band: int = 8


@dataclass(frozen=True)
class Winner:
    """A range in which the kernel beat cuBLAS.

    Attributes:
        size: the least ``n``.
        total: the least ``batch * n * n``; fewer tiles leave processors idle.
        square: for products of square matrices, ``k == n``; otherwise for all others.
        tiling: the fastest one there.
    """

    size: int
    total: int
    square: bool
    tiling: Tiling


WINNERS: tuple[Winner, ...] = (
    Winner(size=2048, total=2**22, square=False, tiling=Tiling(described=True)),
    Winner(size=768, total=2**24, square=False, tiling=Tiling()),
    Winner(size=128, total=2**25, square=True, tiling=Tiling()),
    Winner(size=768, total=2**24, square=True, tiling=Tiling()),
    Winner(size=2048, total=2**22, square=True, tiling=Tiling(warps=4)),
)
"""Searched in order; the first that fits is used. From ``benchmarks/muon_sweep.py`` on an H100 (capability 9.0, torch 2.11,
Triton 3.6, ``benchmarks/results/h100-muon-sweep.json``) against ``torch.baddbmm``: square products in 0.52 to 0.66 of its time,
those of ``k = 2 n`` and ``4 n`` in 0.59 to 0.95. Descriptors are faster from the start, but cost the host 20 us more a product.
Single matrices of less than 2,048 rows took longer."""

CAPABILITY = (9, 0)
"""The only GPUs that :data:`WINNERS` was measured on."""


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, out: Tensor | None = None
) -> Tensor:
    r"""A product that is known to be symmetric, by the faster of two methods.

    .. math:: \alpha A B + \beta C

    Args:
        a: ``[B, n, k]``, of any strides.
        b: ``[B, k, n]``, of the same dtype.
        c: ``[B, n, n]``, symmetric, or None for none.
        alpha, beta: the factors.
        out: where to write the result, ``[B, n, n]``, contiguous; None for a new tensor.

    Returns:
        ``[B, n, n]`` of ``a``'s dtype, whose rounding errors need not be symmetric.
    """
    tiling = fastest(a)
    if tiling is not None:
        from hb_muon.symmetric_kernel import launch_half

        out = a.new_empty(len(a), a.shape[1], a.shape[1]) if out is None else out
        launch_half(out, a, b, c, alpha, beta, tiling)
        return out
    if c is not None:
        return torch.baddbmm(c, a, b, beta=beta, alpha=alpha, out=out)
    return torch.bmm(a, b, out=out) if alpha == 1 else torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=alpha, out=out)


def fastest(a: Tensor) -> Tiling | None:
    """The tiling for products of ``a`` ``[B, n, k]`` with a ``[B, k, n]``; None where ``torch.baddbmm`` is faster."""
    if a.dtype not in (torch.float16, torch.bfloat16) or a.device.type != "cuda" or not usable(a.device):
        return None
    batch, n, k = a.shape
    for winner in WINNERS:
        if n >= winner.size and batch * n * n >= winner.total and winner.square == (k == n):
            return winner.tiling
    return None


@lru_cache
def usable(device: torch.device) -> bool:
    """Whether the kernel was measured on this kind of GPU, and Triton is installed."""
    return torch.cuda.get_device_capability(device) == CAPABILITY and importlib.util.find_spec("triton") is not None


def half_and_mirror(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    tiling: Tiling | None = None,
) -> Tensor:
    """:func:`symmetric_product` by the Triton kernel: on CUDA, or anywhere under ``TRITON_INTERPRET=1``.

    Accumulates in float32 and rounds once. The result is bitwise symmetric outside the diagonal tiles.

    Raises:
        ImportError: Triton is not installed.
        ValueError: the shapes do not make a square product, or the dtypes are not one of float16 and bfloat16.
    """
    from hb_muon.symmetric_kernel import launch_half

    batch, n, k = a.shape
    given = (b.shape, (batch, n, n) if c is None else c.shape)
    if given != ((batch, k, n), (batch, n, n)):
        raise ValueError(f"no square product: {tuple(a.shape)} by {tuple(b.shape)}, plus {tuple(given[1])}")
    dtypes = {x.dtype for x in (a, b, c) if x is not None}
    if dtypes not in ({torch.float16}, {torch.bfloat16}):
        raise ValueError(f"dtypes {sorted(map(str, dtypes))} must be one of float16 and bfloat16")
    out = a.new_empty(batch, n, n)
    launch_half(out, a, b, c, alpha, beta, tiling or Tiling())
    return out
