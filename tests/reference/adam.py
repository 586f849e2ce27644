"""Adam and AMSGrad in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.descent import descend
from reference.options import Array, divided


def adam(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    amsgrad: bool = False,
    division: str = "eps_clamp",
    coupled: bool = True,
    **around: Any,
) -> Array:
    """Kingma and Ba 2015, Adam (arXiv:1412.6980), Algorithm 1, on ``g_t + lambda theta`` as torch.optim.Adam has it::

        m_t     = beta_1 m_{t-1} + (1 - beta_1) g_t
        v_t     = beta_2 v_{t-1} + (1 - beta_2) g_t^2
        theta_t = theta_{t-1} - lr (m_t / (1 - beta_1^t)) / sqrt(v_t / (1 - beta_2^t))

    ``amsgrad`` puts the largest ``v_i`` so far in the place of ``v_t``: Reddi et al. 2018 (arXiv:1904.09237), Algorithm 2.
    """
    beta1, beta2 = betas
    m, v, largest = (np.zeros_like(theta) for _ in range(3))

    def direction(t: int, g: Array) -> Array:
        nonlocal m, v, largest
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        largest = np.maximum(largest, v)
        below = (largest if amsgrad else v) / (1 - beta2**t)
        return divided(m / (1 - beta1**t), np.sqrt(below), eps, division)

    return descend(theta, gradients, direction, lr, coupled=coupled, **around)


def unscaled_adamw(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    division: str = "eps_clamp",
    **around: Any,
) -> Array:
    """HeavyBall's rule: the average of ``g_i / r_i`` with ``r_i = sqrt(v_i / (1 - beta_2^i))``, times the last ``r_t``.

    The average is written out as the weighted mean that bias correction makes of it.
    """
    beta1, beta2 = betas
    squares: list[Array] = []
    ratios: list[Array] = []

    def direction(t: int, g: Array) -> Array:
        squares.append(g**2)
        r = np.sqrt(weighted_mean(squares, beta2))
        ratios.append(divided(g, r, eps, division))
        return weighted_mean(ratios, beta1) * r

    return descend(theta, gradients, direction, lr, **around)


def weighted_mean(values: list[Array], beta: float) -> Array:
    """The mean with weights ``beta^(t - i)`` over ``i = 1..t``."""
    weights = [beta ** (len(values) - 1 - i) for i in range(len(values))]
    return np.asarray(sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights))
