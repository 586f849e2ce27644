"""SUDSAdamW in float64, with the matrix of eigenvectors written out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.descent import descend
from reference.options import Array, divided


def suds_adamw(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    precond_lr: float = 0.01,
    maximize: bool = False,
    **around: Any,
) -> Array:
    """HeavyBall's rule, of no paper. The parameter is one vector, ``f`` the direction of its first gradient, then::

        Q       = the reflection that takes e_1 to f
        theta_t = theta_{t-1} - lr Q Adam(Q^T g_t)
        f       = f + eta ((g^T f) g - (g^T f)^2 f), at length 1        Oja 1982

    A direction is had from the first gradient that is not zero; until then ``Q`` changes the first sign.
    """
    beta1, beta2 = betas
    theta = np.array(theta, dtype=np.float64)
    first, *rest = [(-1 if maximize else 1) * np.asarray(g, dtype=np.float64).ravel() for g in gradients]
    f = first / (np.linalg.norm(first) or 1.0)
    m, v = np.zeros_like(f), np.zeros_like(f)

    def direction(t: int, g: Array) -> Array:
        nonlocal f, m, v
        w = np.eye(len(f))[0] - f
        q = np.eye(len(f)) - (2 * np.outer(w, w) / (w @ w) if w.any() else 0.0)
        m = beta1 * m + (1 - beta1) * (q.T @ g.ravel())
        v = beta2 * v + (1 - beta2) * (q.T @ g.ravel()) ** 2
        u = q @ divided(m / (1 - beta1**t), np.sqrt(v / (1 - beta2**t)), eps)
        g, along = g.ravel(), g.ravel() @ f
        f = f + precond_lr * (along * g - along**2 * f) if f.any() else g
        f = f / (np.linalg.norm(f) or 1.0)
        return u.reshape(theta.shape)

    return descend(theta, [g.reshape(theta.shape) for g in rest], direction, lr, **around)
