"""PSGD with Kronecker factors in float64, one tensor at a time, from psgd_torch's description of each of its rules.

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


def whole(factors: Sequence[Array]) -> Array:
    """``Q = Q_0 x Q_1 x ...`` as one matrix."""
    return functools.reduce(np.kron, [as_matrix(q) for q in factors])


def preconditioned(g: Array, factors: Sequence[Array], root: bool = False) -> Array:
    """``(Q^T Q) vec(g)``, or ``Q vec(g)``."""
    q = whole(factors)
    return ((q if root else q.T @ q) @ g.ravel()).reshape(g.shape)


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


def compared(rule: str, g: Array, v: Array, factors: Sequence[Array], i: int) -> tuple[Array, Array]:
    """psgd_torch's term1 and term2 of dimension i, both matrices."""
    level, eye = g.size / len(factors[i]), np.eye(len(factors[i]))
    if rule == "eq":
        return contracted(preconditioned(g, factors, root=True), i), contracted(unroot(v, factors), i)
    pg = preconditioned(g, factors)
    if rule == "qep":
        q = as_matrix(factors[i])
        return contracted(np.moveaxis(np.tensordot(q, pg, axes=(1, i)), 0, i), i), level * q @ q.T
    return contracted(pg, i), level * eye


def unroot(v: Array, factors: Sequence[Array]) -> Array:
    """``Q^{-T} vec(v)``."""
    return np.linalg.solve(whole(factors).T, v.ravel()).reshape(v.shape)


def moved(rule: str, q: Array, step: float, term1: Array, term2: Array) -> Array:
    """A factor after its step; a diagonal one for diagonal terms."""
    e, dense = term1 - term2, q.ndim == 2
    if not dense:
        e = np.diag(e)
        return q * (1 - step / 2 * e) ** 2 if rule == "quad" else q * (1 - step * e)
    if rule == "quad":
        p = q - step / 2 * e @ q
        p = p - step / 2 * p @ e
        return (p + p.T) / 2
    if rule == "qeq":
        return q - step * q @ e
    return q - step * (np.triu(e) if rule == "eq" else e) @ q


def refreshed(
    rule: str, g: Array, v: Array, factors: Sequence[Array], lipschitz: list[float], draw: Draw,
    lr: float, beta: float, half_iters: int,
) -> list[Array]:  # fmt: skip
    """One refresh; ``lipschitz`` is updated in place. Balances every time: P does not notice."""
    fitted = []
    for i, q in enumerate(factors):
        term1, term2 = compared(rule, g, v, factors, i)
        dense, apart = q.ndim == 2, rule in ("eq", "qep")
        noise = draw((32, len(q))) if dense else None
        total = term1 + term2 if apart else term1
        ell = lower_bound(total, noise, half_iters) if dense else np.diag(total).max()
        ell = ell if apart else ell + term2[0, 0]
        lipschitz[i] = max(beta * lipschitz[i] + (1 - beta) * ell, ell)
        q = moved(rule, q, lr / lipschitz[i], term1, term2)
        fitted.append(rotated(q, noise, half_iters) if dense and rule == "pro" else q)
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
    rule: str = "quad",
    root: bool = False,
    accumulate: bool = False,
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
    """PSGD Kron, Pooladzandi and Li 2024 (arXiv:2402.11858), with one of psgd_torch's rules::

        m_t     = beta m_{t-1} + (1 - beta) g_t,  x = m_t / (1 - beta^t)     (x = g_t without momentum)
        y       = x, or g_t, or the average of what it was since the last refresh
        y~      = y + (dampening + eps |y|) v,    v ~ N(0, 1)
        Q       = rule(Q, y~)
        theta_t = theta_{t-1} - lr_t (clip(Q^T Q x) + lambda theta_{t-1})

    starting from ``Q = s I`` with ``s = (mean y^4 + dampening^4)^(-1/8)``, y the first that is not zero among those at
    refreshes and at the steps 1, 2, 4, 8, ... Axes of length 1 are dropped.

    Args:
        dense: for each axis that is left, whether its factor is a matrix.
        draw: standard normal numbers of a shape; for each refresh v, then 32 vectors for each dense factor.
        rule: "pro", "quad", "qeq", "qep" or "eq".
        root: apply Q instead of Q^T Q.
        accumulate: fit to averages.

    Returns:
        The parameter after the last gradient, and the factors.
    """
    theta = np.array(theta, dtype=np.float64)
    shape = [n for n in theta.shape if n > 1] or [1]
    factors = [np.zeros((n, n) if full else n) for n, full in zip(shape, dense, strict=True)]
    lipschitz, m, started, since = [0.0] * len(shape), np.zeros(shape), False, list[Array]()
    gradients = list(gradients)
    for t, (g, due) in enumerate(zip(gradients, refreshes(probability, len(gradients)), strict=True), start=1):
        g = np.asarray(g, dtype=np.float64).reshape(shape)
        m = beta * m + (1 - beta) * g
        x = m / (1 - beta**t) if exp_avg_input else g
        since.append(x if momentum_into_precond_update else g)
        target = np.mean(since, axis=0) if accumulate else since[-1]
        tried = due or math.log2(t).is_integer()
        if tried and not started and (init_scale is not None or np.any(target != 0)):
            scale = init_scale or (init_scale_scale * (np.mean(target**4) + dampening**4) ** (-1 / 8)) ** init_scale_power
            share = scale ** (1 / len(shape))
            factors = [share * (np.eye(n) if full else np.ones(n)) for n, full in zip(shape, dense, strict=True)]
            started = True
        before = factors
        if due:
            v, since = draw(tuple(shape)), []
            noisy = target + (dampening + EPS_FP32 * np.abs(target)) * v
            if started:
                factors = refreshed(rule, noisy, v, factors, lipschitz, draw, precond_lr, lower_bound_beta, half_iters)
            else:
                for n, full in zip(shape, dense, strict=True):
                    _ = draw((32, n)) if full else None
        u = clip(preconditioned(x, before if delayed else factors, root).reshape(theta.shape))
        theta = theta - warmed_up(lr, t, warmup_steps) * decayed(u, theta, weight_decay)
    return theta, factors
