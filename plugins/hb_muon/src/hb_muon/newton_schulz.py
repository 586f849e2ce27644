r"""Newton-Schulz iterations on stacks of matrices: plain, and on their small Gram matrices.

Each step maps every singular value :math:`\sigma` to :math:`a \sigma + b \sigma^3 + c \sigma^5` and keeps the singular
vectors. All products of a matrix with its transpose, or of polynomials of it, are symmetric:
:mod:`hb_muon.symmetric` computes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hb_muon.coefficients import Row, Table
from hb_muon.passes import normalized, plus_identity
from hb_muon.symmetric import symmetric_product
from hbcore.api import Scalar


def newton_schulz(x: Tensor, coefficients: Table, eps: Scalar, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    r"""The Newton-Schulz iteration of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, one step a row.

    .. math::
        X_0 = X / \max(\|X\|_F, \epsilon) \qquad A = X_k X_k^T \qquad X_{k+1} = a X_k + (b A + c A^2) X_k

    A matrix with more rows than columns is multiplied by :math:`X_k^T X_k` from the right instead: the same result, with
    products of the smaller size, and no transposed copy.

    Args:
        x: ``[B, m, n]``.
        coefficients: the rows ``(a, b, c)``, at least one.
        eps: the least norm to divide by.
        dtype: the iteration's, after normalising in float32, or float64 for float64.
        scale: a factor of the result, at no cost.

    Returns:
        ``[B, m, n]`` in ``dtype``.
    """
    y = normalized(x, eps, 1.0, dtype)
    wide = y.shape[-2] <= y.shape[-1]
    for i, (a, b, c) in enumerate(coefficients, 1):
        s = scale if i == len(coefficients) else 1.0
        z = quadratic(gram_of(y), (a, b, c))
        y = torch.baddbmm(y, z, y, beta=a * s, alpha=s) if wide else torch.baddbmm(y, y, z, beta=a * s, alpha=s)
    return y


def gram_newton_schulz(
    x: Tensor, coefficients: Table, eps: Scalar, dtype: torch.dtype, scale: float = 1.0, restart: int = 2
) -> Tensor:
    r"""The same iteration on the small square matrix :math:`R = X X^T`, after Dao AI Lab 2025, Gram Newton-Schulz.

    .. math::
        Z = b R + c R^2 \qquad Q \leftarrow (a I + Z)\, Q \qquad R \leftarrow (a I + Z)\, R\, (a I + Z)

    and :math:`X \leftarrow Q X` in the end, with :math:`R` and :math:`Q` of the smaller size. All of them are polynomials of
    the first :math:`R` and commute. Rounding errors of :math:`R` grow from step to step, so it is recomputed from :math:`X`
    before step ``restart``, counted from 0, and :math:`a I` is not added to matrices that are squared. float16 has enough bits
    for this; bfloat16 leaves singular values of up to 1.4. A square matrix gains nothing and takes :func:`newton_schulz`,
    which has the same arguments and result.
    """
    if x.shape[-2] == x.shape[-1]:
        return newton_schulz(x, coefficients, eps, dtype, scale)
    y = normalized(x, eps, 1.0, dtype)
    parts = [rows for rows in (coefficients[:restart], coefficients[restart:]) if rows]
    for i, rows in enumerate(parts, 1):
        gram = gram_of(y)
        z = quadratic(gram, rows[0])
        factor = followed(gram, z, plus_identity(z, rows[0][0]), rows)
        y = times(factor, y, scale if i == len(parts) else 1.0)
    return y


def followed(gram: Tensor, z: Tensor, q: Tensor, rows: Table) -> Tensor:
    """The factor that the steps of ``rows`` multiply a matrix by, ``[B, k, k]``, without recomputing ``R``.

    Args:
        gram: ``R``, ``[B, k, k]``.
        z: ``b R + c R R`` of the first row.
        q: ``a I + Z`` of the first row, or a multiple of it.
        rows: at least one.
    """
    a = rows[0][0]
    for row in rows[1:]:
        w = symmetric_product(gram, z, gram, beta=a)
        gram = symmetric_product(z, w, w, beta=a)
        a = row[0]
        z = quadratic(gram, row)
        q = symmetric_product(q, z, q, beta=a)
    return q


def quadratic(gram: Tensor, row: Row) -> Tensor:
    """``b R + c R R``."""
    _, b, c = row
    return symmetric_product(gram, gram, gram, alpha=c, beta=b)


def gram_of(y: Tensor, out: Tensor | None = None) -> Tensor:
    """The smaller of ``Y Y^T`` and ``Y^T Y`` for each matrix, written to ``out`` if given."""
    left, right = (y, y.mT) if y.shape[-2] <= y.shape[-1] else (y.mT, y)
    return symmetric_product(left, right, out=out)


def times(factor: Tensor, y: Tensor, scale: float) -> Tensor:
    """``scale F Y``, or ``scale Y F`` if ``y`` is taller than wide; ``factor`` has the smaller side."""
    left, right = (factor, y) if y.shape[-2] <= y.shape[-1] else (y, factor)
    return torch.bmm(left, right) if scale == 1 else torch.baddbmm(y.new_empty(()), left, right, beta=0, alpha=scale)
