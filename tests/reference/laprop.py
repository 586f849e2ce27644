"""LaProp and its signed form in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.descent import descend
from reference.options import Array, divided


def laprop(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    division: str = "eps_clamp",
    signed: bool = False,
    **around: Any,
) -> Array:
    """Ziyin, Wang and Ueda 2020, LaProp (arXiv:2002.04839), Algorithm 1, with nu for beta_2 and mu for beta_1::

        n_t     = nu n_{t-1} + (1 - nu) g_t^2
        m_t     = mu m_{t-1} + (1 - mu) g_t / sqrt(n_t / (1 - nu^t))
        theta_t = theta_{t-1} - lr m_t / (1 - mu^t)

    ``signed`` takes the sign of each element of the update, and scales the result to the update's Euclidean norm.
    """
    mu, nu = betas
    m, n = np.zeros_like(theta), np.zeros_like(theta)

    def direction(t: int, g: Array) -> Array:
        nonlocal m, n
        n = nu * n + (1 - nu) * g**2
        m = mu * m + (1 - mu) * divided(g, np.sqrt(n / (1 - nu**t)), eps, division)
        u = m / (1 - mu**t)
        moving = np.count_nonzero(u)
        return np.sign(u) * np.sqrt(np.sum(u**2) / moving) if signed and moving else u

    return descend(theta, gradients, direction, lr, **around)
