"""Passes over stacks of matrices: few kernels each on a GPU, torch's own operations elsewhere.

torch's kernels take several launches where a pass needs one, and four times as long where a broadcast factor is combined with a
change of dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hb_muon.coefficients import Row, Table
from hbcore.api import Scalar, at_least, compute_dtype, launching

LEAST = 2**20
"""The least number of elements for which a kernel is worth its launch."""

SMALL = 128
"""The largest side of matrices that :func:`small_factor` takes; a multiprocessor holds several of them."""


def normalized(x: Tensor, least: Scalar, size: float, dtype: torch.dtype) -> Tensor:
    """``size x / max(norm, least)``, computed in float32, or float64 for float64, and rounded once.

    Args:
        x: ``[B, m, n]``.
        least: the least Frobenius norm to divide by.
        size: a factor of the result.
        dtype: of the result.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if fits(x) and x.dtype != torch.float64:
        from hb_muon.passes_kernel import launch_divide

        launch_divide(out, x, float(least), size)
        return out
    return torch.mul(x, size / at_least(frobenius(x), least), out=out)


def begun(gram: Tensor, square: Tensor, least: float, row: Row) -> Tensor:
    r"""The first step of :func:`hb_muon.minimax.minimax` on :math:`R` and :math:`R^2`.

    .. math::
        \nu = \sqrt{\max(\|R^2\|_F, \mathrm{least})} \qquad R \leftarrow R / \nu \qquad
        Z = b R + c R^2 \qquad Q = (a I + Z) / \sqrt{\nu}

    Args:
        gram: ``[B, k, k]``; overwritten with :math:`R / \nu`.
        square: ``R R`` of that ``gram``; overwritten with :math:`Z`.
        least: the lower bound of the norm.
        row: ``(a, b, c)``.

    Returns:
        :math:`Q`, ``[B, k, k]``.
    """
    if fits(gram) and square.is_contiguous() and gram.dtype != torch.float64:
        from hb_muon.passes_kernel import launch_begin

        out = torch.empty_like(gram)
        launch_begin(out, gram, square, least, row)
        return out
    a, b, c = row
    nu = frobenius(square).clamp(min=least).sqrt()
    r = gram / nu
    z = r.mul(b).add_(square / nu**2, alpha=c)
    gram.copy_(r)
    square.copy_(z)
    z.diagonal(dim1=-2, dim2=-1).add_(a)
    return (z * nu.rsqrt()).to(gram.dtype)


def small_factor(gram: Tensor, rows: Table, least: float | None) -> Tensor | None:
    """The factor that the steps of ``rows`` multiply small matrices by, from one kernel; None where it does not run.

    Args:
        gram: the ``R`` of each matrix, ``[B, k, k]``.
        rows: the coefficients of the steps, at least one.
        least: as in :func:`begun`, if the first of the steps takes the bound; otherwise None.
    """
    if not (gram.is_cuda and gram.dtype == torch.float16 and gram.shape[1] <= SMALL and launching.has_triton()):
        return None
    from hb_muon.small_kernel import STEPS, launch_small

    if len(rows) > STEPS:
        return None
    out = torch.empty_like(gram)
    launch_small(out, gram.contiguous(), rows, least)
    return out


def plus_identity(z: Tensor, a: float) -> Tensor:
    """``a I + Z``."""
    out = z.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(a)
    return out


def frobenius(x: Tensor) -> Tensor:
    """The Frobenius norm of each matrix, ``[..., 1, 1]``, in float32, or float64 for float64."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=compute_dtype(x.dtype))
    return norm


def fits(x: Tensor) -> bool:
    """Whether the kernels support a stack ``[B, m, n]`` and are faster."""
    return x.is_cuda and x.is_contiguous() and x.numel() >= LEAST and x.shape[0] < 2**16 and launching.has_triton()
