r"""Newton-Schulz from a tighter bound than the Frobenius norm, on stacks of several shapes at once.

.. math::
    R = X X^T \qquad \sigma_{\max} \le \|R^2\|_F^{1/4} = \Bigl(\sum_i \sigma_i^8\Bigr)^{1/8} \qquad X_0 = X / \|R^2\|_F^{1/4}

The first step needs :math:`R^2` anyway. A matrix of :math:`k` equal singular values starts at :math:`k^{-1/8}` instead of
:math:`k^{-1/2}`, and a Gaussian one 9 times larger at :math:`k = 1000`, which is worth more than a step.

The :math:`R` of a matrix is square, with its smaller side. Those of all stacks with the same smaller side are put into one
stack, and each step on them is one product: a model whose matrices have four shapes and one smaller side takes a third of the
launches, and its products fill the processors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hb_muon.coefficients import Row, Table
from hb_muon.newton_schulz import followed, gram_of, quadratic, times
from hb_muon.passes import begun, frobenius, normalized, plus_identity, small_factor
from hb_muon.symmetric import symmetric_product
from hbcore.api import Scalar

TRACE = 224.0
""":math:`R` starts with this trace: its entries lie in the middle of float16's range, and no entry of its square is larger."""


def minimax(
    stacks: Sequence[Tensor], coefficients: Table, eps: Scalar, dtype: torch.dtype, scales: Sequence[float], restart: int = 2
) -> list[Tensor]:
    """The iteration from the tighter bound, see the module's description.

    :math:`R` is updated over two steps as in :func:`hb_muon.newton_schulz.gram_newton_schulz`, with the same restart. bfloat16
    has too few bits for that, and recomputes :math:`R` in each step.

    Args:
        stacks: ``[B, m, n]`` each, on one device.
        coefficients: the rows ``(a, b, c)``, at least one, for singular values of at most 1, such as
            :data:`hb_muon.coefficients.MINIMAX`.
        eps: the least norm to divide by; the results of smaller matrices are smaller in proportion.
        dtype: the iteration's, after normalising in float32, or float64 for float64.
        scales: the factor of each stack's result.

    Returns:
        For each stack one of the same shape, in ``dtype``.
    """
    sides: dict[int, list[int]] = {}
    for i, x in enumerate(stacks):
        sides.setdefault(min(x.shape[1:]), []).append(i)
    results: dict[int, Tensor] = {}
    iterate = afresh if dtype == torch.bfloat16 else following
    for side, places in sides.items():
        ys = [normalized(stacks[i], eps, math.sqrt(TRACE), dtype) for i in places]
        parts = [rows for rows in (coefficients[:restart], coefficients[restart:]) if rows]
        results.update(zip(places, iterate(ys, parts, [scales[i] for i in places], TRACE**2 / side**1.5), strict=True))
    return [results[i] for i in range(len(stacks))]


def following(ys: list[Tensor], parts: list[Table], scales: Sequence[float], least: float) -> list[Tensor]:
    """The steps on ``R``, which is recomputed at the start of each part; ``least`` bounds the norm of its square from below."""
    for part, rows in enumerate(parts, 1):
        factor = factor_of(grams(ys), rows, least if part == 1 else None)
        last = part == len(parts)
        ys = [times(q, y, s if last else 1.0) for q, y, s in zip(parts_like(ys, factor), ys, scales, strict=True)]
    return ys


def factor_of(gram: Tensor, rows: Table, least: float | None) -> Tensor:
    """The factor that the steps of ``rows`` multiply a matrix by; ``least`` is None unless they begin with the bound."""
    factor = small_factor(gram, rows, least)
    if factor is not None:
        return factor
    if least is None:
        z = quadratic(gram, rows[0])
        return followed(gram, z, plus_identity(z, rows[0][0]), rows)
    square = symmetric_product(gram, gram)
    q = begun(gram, square, least, rows[0])
    return followed(gram, square, q, rows)


def afresh(ys: list[Tensor], parts: list[Table], scales: Sequence[float], least: float) -> list[Tensor]:
    """The same with ``R`` recomputed in each step, and the identity's part added before rounding."""
    return [_afresh(y, [row for rows in parts for row in rows], scale, least) for y, scale in zip(ys, scales, strict=True)]


def _afresh(y: Tensor, rows: list[Row], scale: float, least: float) -> Tensor:
    for i, row in enumerate(rows, 1):
        gram = gram_of(y)
        if i == 1:
            square = symmetric_product(gram, gram)
            nu = frobenius(square).clamp(min=least).sqrt()
            z = (row[1] * (gram / nu) + row[2] * (square / nu**2)).to(y.dtype)
            y = torch.mul(y, nu.rsqrt(), out=torch.empty_like(y))
        else:
            z = quadratic(gram, row)
        s = scale if i == len(rows) else 1.0
        left, right = (z, y) if y.shape[1] <= y.shape[2] else (y, z)
        y = torch.baddbmm(y, left, right, beta=row[0] * s, alpha=s)
    return y


def grams(ys: list[Tensor]) -> Tensor:
    """The smaller of ``Y Y^T`` and ``Y^T Y`` for the matrices of all stacks, ``[sum of B, k, k]``."""
    if len(ys) == 1:
        return gram_of(ys[0])
    side = min(ys[0].shape[1:])
    out = ys[0].new_empty(sum(map(len, ys)), side, side)
    for y, part in zip(ys, parts_like(ys, out), strict=True):
        gram_of(y, part)
    return out


def parts_like(ys: list[Tensor], joined: Tensor) -> Iterator[Tensor]:
    """The matrices of ``joined`` that belong to each stack."""
    start = 0
    for y in ys:
        yield joined[start : start + y.shape[0]]
        start += y.shape[0]
