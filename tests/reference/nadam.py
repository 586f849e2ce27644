"""NAdam in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.descent import descend
from reference.options import Array, divided


def nadam(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.002,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum_decay: float = 4e-3,
    division: str = "eps_clamp",
    coupled: bool = True,
    **around: Any,
) -> Array:
    """Dozat 2016, Incorporating Nesterov Momentum into Adam, Algorithm 2, with the momenta of its section 3.1::

    mu_t    = beta_1 (1 - 0.5 * 0.96^(t psi))
    m_t     = beta_1 m_{t-1} + (1 - beta_1) g_t
    v_t     = beta_2 v_{t-1} + (1 - beta_2) g_t^2
    m_hat   = mu_{t+1} m_t / (1 - prod_{i<=t+1} mu_i) + (1 - mu_t) g_t / (1 - prod_{i<=t} mu_i)
    theta_t = theta_{t-1} - lr m_hat / sqrt(v_t / (1 - beta_2^t))
    """
    beta1, beta2 = betas
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    product = 1.0

    def mu(t: int) -> float:
        return beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))

    def direction(t: int, g: Array) -> Array:
        nonlocal m, v, product
        product *= mu(t)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = mu(t + 1) * m / (1 - product * mu(t + 1)) + (1 - mu(t)) * g / (1 - product)
        return divided(m_hat, np.sqrt(v / (1 - beta2**t)), eps, division)

    return descend(theta, gradients, direction, lr, coupled=coupled, **around)
