"""Lion in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.descent import descend
from reference.options import Array


def lion(
    theta: Array, gradients: Iterable[Array], *, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), **around: Any
) -> Array:
    """Chen et al. 2023, Symbolic Discovery of Optimization Algorithms (arXiv:2302.06675), Algorithm 2::

    c_t     = beta_1 m_{t-1} + (1 - beta_1) g_t
    theta_t = theta_{t-1} - lr (sign(c_t) + lambda theta_{t-1})
    m_t     = beta_2 m_{t-1} + (1 - beta_2) g_t
    """
    beta1, beta2 = betas
    m = np.zeros_like(theta)

    def direction(t: int, g: Array) -> Array:
        nonlocal m
        u = np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
        return u

    return descend(theta, gradients, direction, lr, **around)
