"""LATHER in float64: Adam in the eigenbasis of PSGD's preconditioner, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from reference.options import Array
from reference.psgd import EPS_FP32, Draw, refreshed, refreshes


def lather(
    theta: Array,
    gradients: Iterable[Array],
    *,
    draw: Draw,
    rule: str = "quad",
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    dampening: float = 1e-9,
    probability: Callable[[int], float] = lambda k: 1.0,
) -> Array:
    """HeavyBall 3's LATHER, with SOAP's rule (Vyas et al. 2024, arXiv:2409.11321, Algorithm 4) for the bases::

        Q        = rule(Q, g~)                                  as in reference.psgd
        B_i      = eigenvectors of Q_i^T Q_i                    after the first gradient, which moves nothing
        u        = B_0 adam(B_0^T g B_1) B_1^T                  then, when due, Q and
        B_i      = qr of the columns Q_i^T Q_i B_i, the largest eigenvalue first, each put back in its place
        exp_avg  = R_0^T exp_avg R_1,   R_i = B_i_old^T B_i

    Every factor is dense. The first gradient must not be zero.

    Returns:
        The parameter after the last gradient.
    """
    theta = np.array(theta, dtype=np.float64)
    gradients = [np.asarray(g, dtype=np.float64) for g in gradients]
    share = (np.mean(gradients[0] ** 4) + dampening**4) ** (-1 / 8)
    factors = [share**0.5 * np.eye(n) for n in theta.shape]
    lipschitz, m, v = [0.0, 0.0], np.zeros(theta.shape), np.zeros(theta.shape)

    def fit(g: Array) -> None:
        nonlocal factors
        noise = draw(g.shape)
        noisy = g + (dampening + EPS_FP32 * np.abs(g)) * noise
        factors = refreshed(rule, noisy, noise, factors, lipschitz, draw, 0.1, 0.9, 2)

    fit(gradients[0])
    left, right = (np.linalg.eigh(q.T @ q)[1][:, ::-1] for q in factors)
    due = refreshes(probability, len(gradients))
    for t, g in enumerate(gradients[1:], start=1):
        turned = left.T @ g @ right
        m, v = betas[0] * m + (1 - betas[0]) * turned, betas[1] * v + (1 - betas[1]) * turned**2
        direction = (m / (1 - betas[0] ** t)) / np.maximum(np.sqrt(v / (1 - betas[1] ** t)), eps)
        theta = theta - lr * left @ direction @ right.T
        if due[t]:
            fit(g)
            old, (left, right) = (left, right), (followed(q, b) for q, b in zip(factors, (left, right), strict=True))
            m = (old[0].T @ left).T @ m @ (old[1].T @ right)
    return theta


def followed(q: Array, basis: Array) -> Array:
    """The basis of ``q^T q`` after one power iteration from ``basis``, whose columns stay in their places."""
    image = q.T @ q @ basis
    order = np.argsort(-(basis * image).sum(0), kind="stable")
    fresh = np.empty_like(basis)
    fresh[:, order] = np.linalg.qr(image[:, order])[0]
    return fresh
