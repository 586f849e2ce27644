"""PSGD with Kronecker factors and the PRO rule in float64, one tensor at a time, from psgd_torch's description of it.

The preconditioner is written out as one matrix, the Kronecker product of all factors, which acts on the flattened gradient.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from reference.options import Array, decayed, warmed_up

EPS_FP32 = 2.0**-23
TINY = np.finfo(np.float64).tiny

Draw = Callable[[tuple[int, ...]], Array]


def as_matrix(q: Array) -> Array:
    return np.diag(q) if q.ndim == 1 else q


def preconditioned(g: Array, factors: Sequence[Array]) -> Array:
    """``(Q^T Q) vec(g)`` with ``Q = Q_0 x Q_1 x ...``."""
    q = functools.reduce(np.kron, [as_matrix(q) for q in factors])
    return (q.T @ q @ g.ravel()).reshape(g.shape)


def contracted(a: Array, i: int) -> Array:
    """``sum a[.., j, ..] a[.., k, ..]`` over all axes but i."""
    others = [axis for axis in range(a.ndim) if axis != i]
    return np.tensordot(a, a, axes=(others, others))


def lower_bound(a: Array, noise: Array, half_iters: int) -> float:
    """psgd_torch's norm_lower_bound_spd and _skh, each vector of the subspace by itself::

    A    = A / max |A|                  (for A >= 0 that is max diag A)
    j    = argmax_j |A_j|
    v    = A_j + sgn(<A_j, v>) v
    v    = normalize(v A) A             half_iters times
    norm = max |v|, times what A was divided by
    """
    largest = np.abs(a).max() + TINY
    a = a / largest
    row = max(a, key=lambda r: float(np.sqrt(r @ r)))
    best = 0.0
    for v in noise:
        v = row + np.sign(row @ v) * v
        for _ in range(half_iters):
            v = v @ a
            v = v / (math.sqrt(v @ v) + TINY) @ a
        best = max(best, math.sqrt(v @ v))
    return largest * best


def rotated(q: Array, noise: Array, half_iters: int) -> Array:
    """psgd_torch's procrustes_step2, ``max_step_size = 1/8``."""
    r = q.T - q
    r = r / (lower_bound(r, noise, half_iters) + TINY)
    first, second = np.trace(r @ q), np.trace(r @ r @ q)
    a = min(-first / second, 1 / 8) if second < 0 else 1 / 8
    return q + a * (r @ q) + a * a / 2 * (r @ r @ q)


def pro(
    g: Array, factors: Sequence[Array], lipschitz: list[float], draw: Draw, lr: float, beta: float, half_iters: int
) -> list[Array]:
    """One refresh by the rule Q0.5EQ1.5; ``lipschitz`` is updated in place. Balances every time: P does not notice."""
    pg = preconditioned(g, factors)
    fitted = []
    for i, q in enumerate(factors):
        term1, term2 = contracted(pg, i), g.size / len(q)
        noise = draw((32, len(q))) if q.ndim == 2 else None
        norm = lower_bound(term1, noise, half_iters) if q.ndim == 2 else np.diag(term1).max()
        ell = norm + term2
        lipschitz[i] = max(beta * lipschitz[i] + (1 - beta) * ell, ell)
        if q.ndim == 2:
            q = rotated(q - lr / lipschitz[i] * (term1 @ q - term2 * q), noise, half_iters)
        else:
            q = q * (1 - lr / lipschitz[i] * (np.diag(term1) - term2))
        fitted.append(q)
    sizes = [np.abs(q).max() for q in fitted]
    common = math.prod(sizes) ** (1 / len(sizes))
    return [q * (common / size) for q, size in zip(fitted, sizes, strict=True)]


def refreshes(probability: Callable[[int], float], steps: int) -> list[bool]:
    """Whether the sum of the probabilities reaches a new whole number at steps 1, 2, ..., up to a tolerance of 2^-10."""
    sums = np.cumsum([0.0, *(probability(k) for k in range(1, steps + 1))])
    whole = np.floor(sums + 2.0**-10)
    return [bool(b > a) for a, b in itertools.pairwise(whole)]


def psgd_kron(
    theta: Array,
    gradients: Iterable[Array],
    *,
    dense: Sequence[bool],
    draw: Draw,
    lr: float = 0.001,
    beta: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    precond_lr: float = 0.1,
    lower_bound_beta: float = 0.9,
    dampening: float = 1e-9,
    half_iters: int = 2,
    exp_avg_input: bool = True,
    momentum_into_precond_update: bool = True,
    delayed: bool = False,
    probability: Callable[[int], float] = lambda k: 1.0,
    init_scale: float | None = None,
    init_scale_scale: float = 1.0,
    init_scale_power: float = 1.0,
    clip: Callable[[Array], Array] = lambda u: u,
) -> tuple[Array, list[Array]]:
    """PSGD Kron, Pooladzandi and Li 2024 (arXiv:2402.11858), with psgd_torch's rule Q0.5EQ1.5::

        m_t     = beta m_{t-1} + (1 - beta) g_t,  x = m_t / (1 - beta^t)     (x = g_t without momentum)
        x~      = x + (dampening + eps |x|) v,    v ~ N(0, 1)
        Q       = PRO(Q, x~)
        theta_t = theta_{t-1} - lr_t (clip(Q^T Q x) + lambda theta_{t-1})

    starting from ``Q = s I`` with ``s = (mean x^4 + dampening^4)^(-1/8)``, x the first that is not zero. Axes of length 1 are
    dropped.

    Args:
        dense: for each axis that is left, whether its factor is a matrix.
        draw: standard normal numbers of a shape; for each refresh v, then 32 vectors for each dense factor.

    Returns:
        The parameter after the last gradient, and the factors.
    """
    theta = np.array(theta, dtype=np.float64)
    shape = [n for n in theta.shape if n > 1] or [1]
    factors = [np.zeros((n, n) if full else n) for n, full in zip(shape, dense, strict=True)]
    lipschitz, m, started = [0.0] * len(shape), np.zeros(shape), False
    gradients = list(gradients)
    for t, (g, due) in enumerate(zip(gradients, refreshes(probability, len(gradients)), strict=True), start=1):
        g = np.asarray(g, dtype=np.float64).reshape(shape)
        m = beta * m + (1 - beta) * g
        x = m / (1 - beta**t) if exp_avg_input else g
        target = x if momentum_into_precond_update else g
        if not started and (init_scale is not None or np.any(target != 0)):
            scale = init_scale or (init_scale_scale * (np.mean(target**4) + dampening**4) ** (-1 / 8)) ** init_scale_power
            root = scale ** (1 / len(shape))
            factors = [root * (np.eye(n) if full else np.ones(n)) for n, full in zip(shape, dense, strict=True)]
            started = True
        before = factors
        if due:
            v = draw(tuple(shape))
            noisy = target + (dampening + EPS_FP32 * np.abs(target)) * v
            if started:
                factors = pro(noisy, factors, lipschitz, draw, precond_lr, lower_bound_beta, half_iters)
            else:
                for n, full in zip(shape, dense, strict=True):
                    _ = draw((32, n)) if full else None
        u = clip(preconditioned(x, before if delayed else factors).reshape(theta.shape))
        theta = theta - warmed_up(lr, t, warmup_steps) * decayed(u, theta, weight_decay)
    return theta, factors
