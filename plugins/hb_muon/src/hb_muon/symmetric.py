r"""Products of matrices whose result is symmetric: half of the work, where that is faster than all of it.

The products :math:`X X^T`, and :math:`A B` of two symmetric matrices that commute, as polynomials of one matrix do, are
symmetric. :func:`half_and_mirror` computes the tiles on and below the diagonal alone and writes each of them twice.
:func:`symmetric_product` takes it where it was measured to win, and :func:`torch.baddbmm` everywhere else.
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
        warps, stages: what Triton calls ``num_warps`` and ``num_stages``.
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
        ratio: the least ``k / n``.
        tiling: what was fastest there.
    """

    size: int
    total: int
    ratio: float
    tiling: Tiling


WINNERS: tuple[Winner, ...] = (
    Winner(size=4096, total=2**24, ratio=1.0, tiling=Tiling(stages=4)),
    Winner(size=768, total=2**24, ratio=1.0, tiling=Tiling(warps=4)),
)
"""Searched in order, the first that fits is taken. Measured on an H100 (capability 9.0, torch 2.11, Triton 3.6, float16)
against ``torch.baddbmm``: batches of 24 to 72 with n = 896 and k of 896 and 4,864, 8 with n = 2,048, 4 with n = 4,096 took 0.58
to 0.76 of its time; 12 with n = 768 and 8 with n = 1,024 took as long or longer. ``benchmarks/muon_sweep.py`` measures more."""

CAPABILITY = (9, 0)
"""The only GPUs that :data:`WINNERS` speaks of."""


def symmetric_product(
    a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, diagonal: float = 0.0
) -> Tensor:
    r"""A product that is known to be symmetric, by the faster of two ways.

    .. math:: \alpha A B + \beta C + \delta I

    Args:
        a: ``[B, n, k]``, of any strides.
        b: ``[B, k, n]``, of the same dtype.
        c: ``[B, n, n]``, symmetric, or None for none.
        alpha, beta, diagonal: the factors; ``diagonal`` is :math:`\delta`.

    Returns:
        ``[B, n, n]`` of ``a``'s dtype, whose rounding errors need not be symmetric.
    """
    tiling = fastest(a)
    if tiling is not None:
        return half_and_mirror(a, b, c, alpha, beta, diagonal, tiling)
    if c is None:
        out = torch.bmm(a, b) if alpha == 1 else torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=alpha)
    else:
        out = torch.baddbmm(c, a, b, beta=beta, alpha=alpha)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out


def fastest(a: Tensor) -> Tiling | None:
    """The tiling for products of ``a`` ``[B, n, k]`` with a ``[B, k, n]``; None where ``torch.baddbmm`` is faster."""
    if a.dtype not in (torch.float16, torch.bfloat16) or a.device.type != "cuda" or not usable(a.device):
        return None
    batch, n, k = a.shape
    for winner in WINNERS:
        if n >= winner.size and batch * n * n >= winner.total and k >= winner.ratio * n:
            return winner.tiling
    return None


@lru_cache
def usable(device: torch.device) -> bool:
    """Whether the kernel was measured on this kind of GPU, and Triton is there."""
    return torch.cuda.get_device_capability(device) == CAPABILITY and importlib.util.find_spec("triton") is not None


def half_and_mirror(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    diagonal: float = 0.0,
    tiling: Tiling | None = None,
) -> Tensor:
    """:func:`symmetric_product` by the Triton kernel: on CUDA, or anywhere under ``TRITON_INTERPRET=1``.

    Sums in float32 and rounds once. The result is symmetric bit by bit outside the diagonal tiles.

    Raises:
        ImportError: Triton is not installed.
        ValueError: the shapes do not make a square product, or the dtypes are not one of float16 and bfloat16.
    """
    from hb_muon.symmetric_kernel import launch

    batch, n, k = a.shape
    given = (b.shape, (batch, n, n) if c is None else c.shape)
    if given != ((batch, k, n), (batch, n, n)):
        raise ValueError(f"no square product: {tuple(a.shape)} by {tuple(b.shape)}, plus {tuple(given[1])}")
    dtypes = {x.dtype for x in (a, b, c) if x is not None}
    if dtypes not in ({torch.float16}, {torch.bfloat16}):
        raise ValueError(f"dtypes {sorted(map(str, dtypes))} must be one of float16 and bfloat16")
    out = torch.empty(batch, n, n, dtype=a.dtype, device=a.device)
    launch(out, a, b, c, alpha, beta, diagonal, tiling or Tiling())
    return out
