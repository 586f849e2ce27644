r"""Newton-Schulz iterations on stacks of matrices: plain, on the small square matrix, and with a closer bound to begin with.

Each step turns every singular value :math:`\sigma` into :math:`a \sigma + b \sigma^3 + c \sigma^5` and leaves the singular
vectors alone. All products of a matrix with its transpose, or of polynomials of it, are symmetric:
:mod:`hb_muon.symmetric` computes them.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from hb_muon.coefficients import Row, Table
from hb_muon.rescale import rescaled
from hb_muon.symmetric import symmetric_product
from hbcore.api import compute_dtype

Number: TypeAlias = "Tensor | float"

LONG = 1.5
"""From this ratio of the sides on, :func:`minimax` works on the small square matrix: fewer operations, in full products."""


def newton_schulz(x: Tensor, coefficients: Table, eps: Number, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    r"""The Newton-Schulz iteration of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, one step a row.

    .. math::
        X_0 = X / \max(\|X\|_F, \epsilon) \qquad A = X_k X_k^T \qquad X_{k+1} = a X_k + (b A + c A^2) X_k

    A matrix with more rows than columns multiplies by :math:`X_k^T X_k` from the right instead: the same matrix, with
    products of the smaller size, and no transposed copy.

    Args:
        x: ``[..., m, n]``.
        coefficients: the rows ``(a, b, c)``, at least one.
        eps: the least norm to divide by.
        dtype: what to iterate in, after normalising in float32, or float64 for float64.
        scale: a factor of the result, which costs nothing here.

    Returns:
        ``[..., m, n]`` in ``dtype``.
    """
    y = normalized(x, eps, dtype)
    wide = y.shape[-2] <= y.shape[-1]
    for i, (a, b, c) in enumerate(coefficients, 1):
        s = scale if i == len(coefficients) else 1.0
        z = quadratic(gram_of(y, wide), (0.0, b, c))
        y = torch.baddbmm(y, z, y, beta=a * s, alpha=s) if wide else torch.baddbmm(y, y, z, beta=a * s, alpha=s)
    return y.reshape(x.shape)


def gram_newton_schulz(
    x: Tensor, coefficients: Table, eps: Number, dtype: torch.dtype, scale: float = 1.0, restart: int = 2
) -> Tensor:
    r"""The same iteration on the small square matrix :math:`R = X X^T`, after Dao AI Lab 2025, Gram Newton-Schulz.

    .. math::
        Z = b R + c R^2 \qquad Q \leftarrow (a I + Z)\, Q \qquad R \leftarrow (a I + Z)\, R\, (a I + Z)

    and :math:`X \leftarrow Q X` in the end, with :math:`R` and :math:`Q` of the smaller size. All of them are polynomials of
    the first :math:`R` and commute. Rounding errors of :math:`R` grow from step to step, so that it is taken anew from
    :math:`X` before step ``restart``, counted from 0, and :math:`a I` is added to no matrix that is squared. float16 has the
    bits that this needs; bfloat16 leaves singular values of up to 1.4. A square matrix has nothing to gain and takes
    :func:`newton_schulz`, whose arguments and result these are.
    """
    if x.shape[-2] == x.shape[-1]:
        return newton_schulz(x, coefficients, eps, dtype, scale)
    y = normalized(x, eps, dtype)
    wide = y.shape[-2] <= y.shape[-1]
    parts = [rows for rows in (coefficients[:restart], coefficients[restart:]) if rows]
    for i, rows in enumerate(parts, 1):
        gram = gram_of(y, wide)
        factor = gram_factor(gram, quadratic(gram, rows[0]), rows)
        y = multiplied(factor, y, wide, scale if i == len(parts) else 1.0)
    return y.reshape(x.shape)


def minimax(x: Tensor, coefficients: Table, eps: Number, dtype: torch.dtype, scale: float = 1.0, restart: int = 2) -> Tensor:
    r"""Newton-Schulz from a bound on the largest singular value that is closer than the Frobenius norm.

    .. math::
        R = X X^T \qquad \sigma_{\max} \le \|R^2\|_F^{1/4} = \Bigl(\sum_i \sigma_i^8\Bigr)^{1/8} \qquad
        X_0 = X / \|R^2\|_F^{1/4}

    The first step needs :math:`R^2` anyway. A matrix of :math:`k` equal singular values starts at :math:`k^{-1/8}` instead
    of :math:`k^{-1/2}`, and a Gaussian one 9 times larger where :math:`k` is 1,000: which is worth more than a step. Long
    matrices iterate on :math:`R` as :func:`gram_newton_schulz` does, with the same restart; those whose sides differ by less
    than :data:`LONG` take :math:`R` anew in each step. Coefficients must be for singular values of at most 1, as those of
    :data:`hb_muon.coefficients.MINIMAX` are.

    Args, result: those of :func:`newton_schulz`. Matrices smaller than ``eps`` stay smaller in proportion.
    """
    short, long = sorted(x.shape[-2:])
    trace = float(min(short, 2**14))  # of R, to keep its entries in the middle of what float16 holds
    y = normalized(x, eps, dtype, math.sqrt(trace))
    wide = y.shape[-2] <= y.shape[-1]
    # bfloat16 has too few bits to follow R over two steps
    together = restart if long >= LONG * short and dtype != torch.bfloat16 else 1
    parts = [rows for rows in (coefficients[:together], coefficients[together:]) if rows]
    if together == 1:
        parts = [(row,) for row in coefficients]
    for i, rows in enumerate(parts, 1):
        gram, square, shrink = gram_of(y, wide), None, None
        if i == 1:
            gram, square, shrink = bounded(gram, trace)
        z = quadratic(gram, rows[0], square)
        y = advanced(y, gram, z, rows, wide, scale if i == len(parts) else 1.0, shrink)
    return y.reshape(x.shape)


def advanced(y: Tensor, gram: Tensor, z: Tensor, rows: Table, wide: bool, scale: float, shrink: Tensor | None) -> Tensor:
    """``y`` after the steps of ``rows``, times ``scale`` and ``shrink`` ``[B, 1, 1]``. May overwrite ``z``."""
    if len(rows) == 1:  # the identity's part is added to the sums, before they are rounded
        a = rows[0][0]
        left, right = (z, y) if wide else (y, z)
        y = torch.baddbmm(y, left, right, beta=a * scale, alpha=scale)
        return y if shrink is None else rescaled(y, shrink, y.dtype)
    factor = gram_factor(gram, z, rows)
    return multiplied(factor if shrink is None else rescaled(factor, shrink, y.dtype), y, wide, scale)


def bounded(gram: Tensor, trace: float) -> tuple[Tensor, Tensor, Tensor]:
    """``R / nu``, its square and ``nu ** -0.5``, where ``nu``, the root of the norm of ``R R``, bounds ``R``'s eigenvalues.

    Two divisions, since the square of an ``R`` of trace ``trace`` may be more than float16 holds. A matrix of that trace has
    no smaller norms than those that are the least here; only one that ``eps`` kept small has.
    """
    side, dtype = gram.shape[-1], gram.dtype
    first = frobenius(gram).clamp(min=trace / math.sqrt(side))
    gram = rescaled(gram, 1 / first, dtype)
    square = symmetric_product(gram, gram)
    root = frobenius(square).clamp(min=1 / math.sqrt(side)).sqrt()
    return rescaled(gram, 1 / root, dtype), rescaled(square, root**-2, dtype), (first * root).rsqrt()


def gram_factor(gram: Tensor, z: Tensor, rows: Table) -> Tensor:
    """What the steps of ``rows`` multiply a matrix by, ``[B, k, k]``.

    Args:
        gram: the small square matrix ``R``, ``[B, k, k]``.
        z: ``b R + c R R`` of the first row.
        rows: at least one.
    """
    a = rows[0][0]
    q = z.clone()
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    for row in rows[1:]:
        w = symmetric_product(gram, z, gram, beta=a)
        gram = symmetric_product(z, w, w, beta=a)
        a = row[0]
        z = quadratic(gram, row)
        q = symmetric_product(q, z, q, beta=a)
    return q


def quadratic(gram: Tensor, row: Row, square: Tensor | None = None) -> Tensor:
    """``b R + c R R``, where ``square`` is ``R R`` if that is there already, and may then be overwritten."""
    _, b, c = row
    if square is None:
        return symmetric_product(gram, gram, gram, alpha=c, beta=b)
    return square.mul_(c).add_(gram, alpha=b)


def gram_of(y: Tensor, wide: bool) -> Tensor:
    """The smaller one of ``Y Y^T`` and ``Y^T Y``."""
    return symmetric_product(y, y.mT) if wide else symmetric_product(y.mT, y)


def multiplied(factor: Tensor, y: Tensor, wide: bool, scale: float) -> Tensor:
    """``scale F Y``, or ``scale Y F`` where ``y`` is not ``wide``. May overwrite ``factor``."""
    if scale != 1:
        factor.mul_(scale)
    return factor @ y if wide else y @ factor


def normalized(x: Tensor, eps: Number, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    """``size x / max(norm, eps)``, as ``[B, m, n]`` in ``dtype``, divided in float32, or in float64 for float64."""
    flat = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return rescaled(flat, size / at_least(frobenius(flat), eps), dtype)


def frobenius(x: Tensor) -> Tensor:
    """The Frobenius norm of each matrix, ``[..., 1, 1]``, in float32, or float64 for float64."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=compute_dtype(x.dtype))
    return norm


def at_least(x: Tensor, eps: Number) -> Tensor:
    """``max(x, eps)``."""
    return torch.maximum(x, eps) if isinstance(eps, Tensor) else x.clamp(min=eps)
