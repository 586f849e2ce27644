r"""Orthogonal factors of stacks of matrices, ``[..., m, n]``. Pure and batched: each matrix is treated by itself.

A matrix :math:`X = U \Sigma V^T` has the polar factor :math:`U V^T`, the nearest matrix whose singular values are all 1.
:func:`exact` computes it. :func:`newton_schulz` and :func:`gram_newton_schulz` come close to it with matrix products alone:
a step with coefficients :math:`(a, b, c)` turns each singular value :math:`\sigma` into
:math:`a \sigma + b \sigma^3 + c \sigma^5`, and leaves :math:`U` and :math:`V` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hbcore.api import HyperparameterError, compute_dtype

Row: TypeAlias = tuple[float, float, float]
Table: TypeAlias = tuple[Row, ...]
Coefficients: TypeAlias = "str | Sequence[float] | Sequence[Sequence[float]] | None"
Number: TypeAlias = "Tensor | float"

JORDAN: Table = ((3.4445, -4.7750, 2.0315),) * 5
"""Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. Takes singular values of [0.002, 1] to [0.68, 1.21]."""

YOU: Table = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""You Jiacheng 2025, as HeavyBall has it: a row for each step. Takes [0.002, 1] to [0.85, 1.15]."""


def polar_express(safety: float) -> Table:
    """The table of Amsel et al. 2025, The Polar Express (arXiv:2505.16932), for singular values from 0.001 up.

    Each row is optimal after the rows before it, for singular values up to 1 exactly. Rounding may carry one past that, where
    the polynomials grow without bound: evaluating them at ``x / safety`` keeps it inside. The last row, the classical one
    that attracts everything near 1 to 1, is left as it is.
    """
    return (*((a / safety, b / safety**3, c / safety**5) for a, b, c in _POLAR_EXPRESS), (1.875, -1.25, 0.375))


_POLAR_EXPRESS: Table = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

POLAR_EXPRESS: Table = polar_express(1.01)
"""With the safety factor of the paper's code. Five steps take [0.002, 1] to [0.87, 1.13], seven to 1 within 0.001."""

GRAM: Table = polar_express(1.05)
"""With the larger one that :func:`gram_newton_schulz`, which rounds differently, is published with."""

TABLES: dict[str, Table] = {"jordan": JORDAN, "you": YOU, "polar_express": POLAR_EXPRESS}
"""What may be named as ``ns_coefficients``."""

METHODS: dict[str, tuple[Table, torch.dtype]] = {
    "newton_schulz": (YOU, torch.bfloat16),
    "gram_newton_schulz": (GRAM, torch.float16),
    "exact": ((), torch.float32),
}
"""The names of methods, and the coefficients and the dtype that each has by default."""


def orthogonalize(
    x: Tensor,
    method: str = "newton_schulz",
    ns_steps: int = 5,
    ns_coefficients: Coefficients = None,
    dtype: torch.dtype | None = None,
    eps: Number = 1e-7,
) -> Tensor:
    """The orthogonal factor of each matrix of a stack, by the method that is asked for.

    Args:
        x: ``[..., m, n]``, any floating dtype and scale. A zero matrix gives zeros; zero singular values stay zero.
        method: ``"newton_schulz"``, ``"gram_newton_schulz"`` or ``"exact"``.
        ns_steps: how many steps the iterations take.
        ns_coefficients: see :func:`table`; the method's own by default.
        dtype: what the iterations compute in. By default float64 for float64, and for all else bfloat16 in
            ``newton_schulz``, float16 in ``gram_newton_schulz``. ``exact`` computes in float32 or float64 whatever it says.
        eps: the least Frobenius norm that a matrix is divided by.

    Returns:
        ``[..., m, n]`` in ``dtype``.

    Raises:
        HyperparameterError: the method, the table or the number of steps does not exist.
    """
    if method not in METHODS:
        raise HyperparameterError(f"method={method!r} does not exist; pass one of {', '.join(METHODS)}.")
    if dtype is None:
        dtype = torch.float64 if x.dtype == torch.float64 else METHODS[method][1]
    if method == "exact":
        return exact(x).to(dtype)
    iterate = newton_schulz if method == "newton_schulz" else gram_newton_schulz
    rows = METHODS[method][0] if ns_coefficients is None else table(ns_coefficients)
    return iterate(x, steps_of(rows, ns_steps), eps, dtype)


def newton_schulz(x: Tensor, coefficients: Table, eps: Number, dtype: torch.dtype) -> Tensor:
    r"""The Newton-Schulz iteration of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, one step a row.

    .. math::
        X_0 = X / \max(\|X\|_F, \epsilon) \qquad A = X_k X_k^T \qquad X_{k+1} = a X_k + (b A + c A^2) X_k

    A matrix with more rows than columns multiplies by :math:`X_k^T X_k` from the right instead: the same matrix, with
    products of the smaller size, and no transposed copy.

    Args:
        x: ``[..., m, n]``.
        coefficients: the rows ``(a, b, c)``.
        eps: the least norm to divide by.
        dtype: what to iterate in, after normalising in float32, or float64 for float64.

    Returns:
        ``[..., m, n]`` in ``dtype``.
    """
    y = normalized(x, eps).to(dtype)
    wide = y.shape[-2] <= y.shape[-1]
    for a, b, c in coefficients:
        gram = y @ y.mT if wide else y.mT @ y
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        y = torch.baddbmm(y, z, y, beta=a) if wide else torch.baddbmm(y, y, z, beta=a)
    return y.reshape(x.shape)


def gram_newton_schulz(x: Tensor, coefficients: Table, eps: Number, dtype: torch.dtype, restart: int = 2) -> Tensor:
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
        return newton_schulz(x, coefficients, eps, dtype)
    y = normalized(x, eps).to(dtype)
    for rows in filter(None, (coefficients[:restart], coefficients[restart:])):
        y = gram_factor(y @ y.mT, rows) @ y if y.shape[-2] < y.shape[-1] else y @ gram_factor(y.mT @ y, rows)
    return y.reshape(x.shape)


def gram_factor(gram: Tensor, rows: Table) -> Tensor:
    """What the steps of ``rows`` multiply a matrix by, given its small square matrix: ``[B, k, k]`` of ``[B, k, k]``."""
    (a, b, c), *others = rows
    z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    q = z + a * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for row in others:
        w = torch.baddbmm(gram, gram, z, beta=a)
        gram = torch.baddbmm(w, z, w, beta=a)
        a, b, c = row
        z = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q = torch.baddbmm(q, q, z, beta=a)
    return q


def exact(x: Tensor) -> Tensor:
    r"""The polar factor :math:`U V^T` of each matrix, from its singular value decomposition.

    Directions whose singular value is zero, to the precision of the dtype, have no orthogonal factor of their own; they
    become zero, so that the result is unique.

    Args:
        x: ``[..., m, n]``; computed in float32, or float64 for float64.

    Returns:
        ``[..., m, n]`` in the dtype that it was computed in.

    Raises:
        torch.linalg.LinAlgError: a matrix has entries that are not finite.
    """
    x = x.to(compute_dtype(x.dtype))
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    present = s > s[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    factor: Tensor = (u * present.unsqueeze(-2).to(x.dtype)) @ vt
    return factor


def normalized(x: Tensor, eps: Number) -> Tensor:
    """``x / max(norm, eps)``, as ``[B, m, n]`` in float32, or float64 for float64."""
    flat = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    return flat / at_least(frobenius(flat), eps)  # which takes the dtype of the norm


def frobenius(x: Tensor) -> Tensor:
    """The Frobenius norm of each matrix, ``[..., 1, 1]``, in float32, or float64 for float64."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=compute_dtype(x.dtype))
    return norm


def at_least(x: Tensor, eps: Number) -> Tensor:
    """``max(x, eps)``."""
    return torch.maximum(x, eps) if isinstance(eps, Tensor) else x.clamp(min=eps)


def table(coefficients: str | Sequence[float] | Sequence[Sequence[float]]) -> Table:
    """Coefficients as rows ``(a, b, c)``.

    Args:
        coefficients: the name of one of :data:`TABLES`, one triple for all steps, or a triple for each step.

    Raises:
        HyperparameterError: it is none of these.
    """
    if isinstance(coefficients, str):
        if coefficients not in TABLES:
            raise HyperparameterError(
                f"ns_coefficients={coefficients!r} does not exist; pass one of {', '.join(TABLES)}, or numbers."
            )
        return TABLES[coefficients]
    rows = tuple(tuple(map(float, row)) if isinstance(row, Sequence) else (float(row),) for row in coefficients)
    if len(rows) == 3 and {len(row) for row in rows} == {1}:
        rows = (tuple(number for row in rows for number in row),)
    if not rows or any(len(row) != 3 for row in rows):
        raise HyperparameterError(f"ns_coefficients={coefficients!r} must be three numbers, or three numbers for each step.")
    return tuple((a, b, c) for a, b, c in rows)


def steps_of(rows: Table, count: int) -> Table:
    """The rows of ``count`` steps: the first ones, and the last one again where there are too few."""
    return rows[:count] + rows[-1:] * (count - len(rows))
