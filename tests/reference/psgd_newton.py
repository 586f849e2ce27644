"""The Newton form of PSGD's rules in float64, one tensor at a time, from psgd_torch's description of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from reference.options import Array
from reference.psgd import (
    EPS_FP32,
    Draw,
    as_matrix,
    compared,
    contracted,
    lower_bound,
    moved,
    preconditioned,
    refreshed,
    rotated,
)


def terms(rule: str, h: Array, v: Array, factors: Sequence[Array], i: int) -> tuple[Array, Array]:
    """psgd_torch's term1 and term2 of dimension i for a pair (v, h = H v), both matrices."""
    if rule == "eq":
        return compared(rule, h, v, factors, i)
    ph = preconditioned(h, factors)
    if rule == "qep":
        q = as_matrix(factors[i])
        ph, v = (np.moveaxis(np.tensordot(q, x, axes=(1, i)), 0, i) for x in (ph, v))
    return contracted(ph, i), contracted(v, i)


def newton(
    rule: str, h: Array, v: Array, factors: Sequence[Array], lipschitz: list[float], draw: Draw,
    lr: float, beta: float, half_iters: int,
) -> list[Array]:  # fmt: skip
    """psgd_torch's update_precond_kron_newton_*, for a pair (v, h = H v); ``lipschitz`` is updated in place::

        ell   = norm_lower_bound_spd(term1 + term2)                       (max for a diagonal factor)
        L_i   = max(beta L_i + (1 - beta) ell, ell)
        Q_i   = the rule's step of lr / L_i by term1 - term2

    Balances every time: P does not notice.
    """
    fitted = []
    for i, q in enumerate(factors):
        term1, term2 = terms(rule, h, v, factors, i)
        noise = draw((32, len(q))) if q.ndim == 2 else None
        ell = lower_bound(term1 + term2, noise, half_iters) if q.ndim == 2 else np.diag(term1 + term2).max()
        lipschitz[i] = max(beta * lipschitz[i] + (1 - beta) * ell, ell)
        q = moved(rule, q, lr / lipschitz[i], term1, term2)
        fitted.append(rotated(q, noise, half_iters) if q.ndim == 2 and rule == "pro" else q)
    sizes = [np.abs(q).max() for q in fitted]
    common = math.prod(sizes) ** (1 / len(sizes))
    return [q * (common / size) for q, size in zip(fitted, sizes, strict=True)]


def newton_kron(
    theta: Array,
    gradients: Iterable[Array],
    pairs: Callable[[int], tuple[Array, Array] | None],
    *,
    dense: Sequence[bool],
    draw: Draw,
    lr: float,
    rule: str = "quad",
    beta: float = 0.9,
    precond_lr: float = 0.1,
    lower_bound_beta: float = 0.9,
    dampening: float = 1e-9,
    half_iters: int = 2,
) -> tuple[Array, list[Array]]:
    """PSGD Kron as psgd_torch's KronNewton, without clipping; steps without a pair (v, h) whiten the momentum::

        m_t     = beta m_{t-1} + (1 - beta) g_t,  x = m_t / (1 - beta^t)
        h~      = h + (dampening + eps |h|) w,    w ~ N(0, 1)
        Q       = newton(Q, h~, v), or the whitening rule's as in :func:`reference.psgd.psgd_kron`
        theta_t = theta_{t-1} - lr Q^T Q x

    starting from ``Q = s I`` with ``s = mean(v^2)^(1/4) (mean h^4 + dampening^4)^(-1/8)`` of the first pair, at step 1.
    """
    theta, shape = np.array(theta, dtype=np.float64), np.shape(theta)
    factors: list[Array] = []
    lipschitz, m = [0.0] * len(shape), np.zeros(shape)
    for t, g in enumerate(gradients, start=1):
        m = beta * m + (1 - beta) * g
        x, pair = m / (1 - beta**t), pairs(t)
        if not factors:
            assert pair is not None
            v, h = pair
            scale = np.mean(v**2) ** (1 / 4) * (np.mean(h**4) + dampening**4) ** (-1 / 8)
            one = scale ** (1 / len(shape))
            factors = [one * (np.eye(n) if full else np.ones(n)) for n, full in zip(shape, dense, strict=True)]
        fitted, noise = x if pair is None else pair[1], draw(shape)
        noisy = fitted + (dampening + EPS_FP32 * np.abs(fitted)) * noise
        rest = (factors, lipschitz, draw, precond_lr, lower_bound_beta, half_iters)
        factors = refreshed(rule, noisy, noise, *rest) if pair is None else newton(rule, noisy, pair[0], *rest)
        theta = theta - lr * preconditioned(x, factors)
    return theta, factors
