"""Adafactor in float64."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from reference.options import Array, cautious, decayed, divided, warmed_up


def adafactor(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.01,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    maximize: bool = False,
    caution: bool = False,
    cautious_weight_decay: bool = False,
    division: str = "eps_clamp",
    precision: type[np.floating] = np.float64,
) -> Array:
    """Shazeer and Stern 2018 (arXiv:1804.04235), Algorithms 4 and 5, with torch.optim.Adafactor's floors and decay::

        w_t     = t^tau,  rho_t = min(lr_t, 1 / sqrt(t)),  alpha_t = max(eps_2, RMS(theta)) rho_t
        R_t     = (1 - w_t) R_{t-1} + w_t (means of g^2 along rows),  C_t alike along columns
        V_ij    = R_i C_j / max(mean(R), eps_1)             of each matrix; of a vector, the average of g^2 itself
        U       = g / max(sqrt(V), eps_1)
        theta_t = theta - alpha_t U / max(1, RMS(U) / d) - lr_t lambda theta

    A parameter of more than two dimensions is many matrices, each with its own averages, and one RMS. ``eps_1`` None is the
    last bit of 1 in ``precision``.
    """
    eps1 = float(np.finfo(precision).eps) if eps[0] is None else eps[0]
    theta = np.array(theta, dtype=np.float64)
    matrices = theta.reshape(-1, *theta.shape[-2:]).shape if theta.ndim > 1 else (1, theta.size, 1)
    rows = [np.zeros(matrices[1]) for _ in range(matrices[0])]
    cols = [np.zeros(matrices[2]) for _ in range(matrices[0])]
    v = np.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        g, w, lr_t = -g if maximize else g, t**beta2_decay, warmed_up(lr, t, warmup_steps)
        if theta.ndim > 1:
            for k, matrix in enumerate(np.square(g).reshape(matrices)):
                rows[k] = (1 - w) * rows[k] + w * matrix.mean(axis=1)
                cols[k] = (1 - w) * cols[k] + w * matrix.mean(axis=0)
            v = np.stack([np.outer(r, c) / max(r.mean(), eps1) for r, c in zip(rows, cols, strict=True)]).reshape(theta.shape)
        else:
            v = (1 - w) * v + w * np.square(g)
        u = divided(g, np.sqrt(v), eps1, division)
        relative = min(1.0, 1 / (lr_t * t**0.5)) if lr_t else 1.0
        u = u * (relative * max(eps[1], rms(theta)) / max(1.0, rms(u) / d))
        u = cautious(u, g) if caution else u
        theta = theta - lr_t * decayed(u, theta, weight_decay, cautious_weight_decay)
    return theta


def rms(x: Array) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(x))))
