"""SOAP in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from reference.adamw import adamw
from reference.options import Array, decayed, divided, warmed_up


def joined(shape: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """All dimensions but the first multiplied together, from the last on, while within ``limit``; ones vanish."""
    result: list[int] = []
    for n in shape[:0:-1]:
        if n == 1:
            continue
        if result and result[0] * n <= limit:
            result[0] *= n
        else:
            result.insert(0, n)
    return (*shape[:1], *result)


def unfolded(x: Array, dim: int) -> Array:
    """The matrix whose rows are the slices of ``x`` along ``dim``."""
    return np.moveaxis(x, dim, 0).reshape(x.shape[dim], -1)


def turned(x: Array, bases: dict[int, Array], back: bool = False) -> Array:
    """``x`` in the bases, whose columns are the new axes, or back from there."""
    for dim, q in bases.items():
        x = np.moveaxis(np.tensordot(q if back else q.T, x, axes=(1, dim)), 0, dim)
    return x


def soap(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.003,
    betas: tuple[float, float] = (0.9, 0.95),
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    precondition_frequency: int = 2,
    schedule: tuple[float, float] | None = None,
    max_precond_dim: int = 2048,
    merge_dims: bool = True,
    precondition_1d: bool = False,
    division: str = "eps_clamp",
    warmup_steps: int = 0,
) -> Array:
    """Vyas et al. 2024, SOAP: Improving and Stabilizing Shampoo using Adam (arXiv:2409.11321), Algorithm 3.

    For a matrix, with the first moment kept in the basis and turned with it, as the authors' code does::

        first gradient:  L = (1 - b3) G G^T,  R = (1 - b3) G^T G,  QL, QR = their eigenvectors; theta stays
        every other one: G' = QL^T G QR
                         M = b1 M + (1 - b1) G',  V = b2 V + (1 - b2) G'^2
                         theta = theta - lr (QL (M_hat / sqrt(V_hat)) QR^T + lambda theta)
                         L = b3 L + (1 - b3) G G^T,  R = b3 R + (1 - b3) G^T G
        when it is due:  M = QL M QR^T
                         sort QL by diag(QL^T L QL), largest first, and V's rows like it;  QL = qr(L QL);  the same for R
                         M = QL^T M QR

    Other numbers of dimensions have a factor for each. It is due at every multiple of ``precondition_frequency``, counting
    gradients from 1, or, given ``schedule=(a, b)``, whenever the sum of ``1 / (1 + log10(k^a)^b)`` passes a whole number.
    Returns the parameter after the last gradient. What has no factor is AdamW's.
    """
    beta1, beta2 = betas
    gradients = list(gradients)
    shape = joined(np.shape(theta), max_precond_dim) if merge_dims else np.shape(theta)
    dims = [i for i, n in enumerate(shape) if 2 <= n <= max_precond_dim]
    if not dims or (np.ndim(theta) < 2 and not precondition_1d):
        return adamw(
            theta, gradients, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, division=division,
            warmup_steps=warmup_steps,
        )  # fmt: skip
    p = np.array(theta, dtype=np.float64).reshape(shape)
    m, v = np.zeros_like(p), np.zeros_like(p)
    factors, bases = {}, {}
    total = 1.0
    for k, g in enumerate((np.asarray(g).reshape(shape) for g in gradients), start=1):
        if k == 1:
            for i in dims:
                factors[i] = (1 - shampoo_beta) * unfolded(g, i) @ unfolded(g, i).T
                bases[i] = np.linalg.eigh(factors[i])[1][:, ::-1]
            continue
        t = k - 1
        rotated = turned(g, bases)
        m = beta1 * m + (1 - beta1) * rotated
        v = beta2 * v + (1 - beta2) * rotated**2
        u = divided(m / (1 - beta1**t), np.sqrt(v / (1 - beta2**t)), eps, division)
        p = p - warmed_up(lr, t, warmup_steps) * decayed(turned(u, bases, back=True), p, weight_decay)
        for i in dims:
            factors[i] = shampoo_beta * factors[i] + (1 - shampoo_beta) * unfolded(g, i) @ unfolded(g, i).T
        due = k % precondition_frequency == 0
        if schedule is not None:
            before, total = total, total + 1 / (1 + math.log10(k ** schedule[0]) ** schedule[1])
            due = math.floor(total + 2**-10) > math.floor(before + 2**-10)
        if due:
            m = turned(m, bases, back=True)
            for i in dims:
                order = np.argsort(-np.diag(bases[i].T @ factors[i] @ bases[i]))
                v = np.take(v, order, axis=i)
                bases[i] = np.linalg.qr(factors[i] @ bases[i][:, order])[0]
            m = turned(m, bases)
    return p.reshape(np.shape(theta))
