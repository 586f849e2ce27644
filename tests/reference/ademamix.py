"""AdEMAMix in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.descent import descend
from reference.options import Array, divided


def ademamix(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.001,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    eps: float = 1e-8,
    alpha: float = 2.0,
    beta3_warmup: int | None = None,
    alpha_warmup: int | None = None,
    division: str = "eps_clamp",
    **around: Any,
) -> Array:
    """Pagliardini, Ablin and Grangier 2024 (arXiv:2409.03137), Algorithm 1, with the schedules of its section 3::

    alpha_t  = min(t alpha / T_alpha, alpha)
    beta_3_t = min(exp(ln(beta_1) ln(beta_3) / ((1 - t/T_beta) ln(beta_3) + t/T_beta ln(beta_1))), beta_3)
    m1_t     = beta_1 m1_{t-1} + (1 - beta_1) g_t
    m2_t     = beta_3_t m2_{t-1} + (1 - beta_3_t) g_t
    v_t      = beta_2 v_{t-1} + (1 - beta_2) g_t^2
    theta_t  = theta_{t-1} - lr (m1_t / (1 - beta_1^t) + alpha_t m2_t) / sqrt(v_t / (1 - beta_2^t))
    """
    beta1, beta2, beta3 = betas
    fast, slow, v = (np.zeros_like(theta) for _ in range(3))

    def beta3_at(t: int) -> float:
        if beta3_warmup is None or t >= beta3_warmup:
            return beta3
        share = t / beta3_warmup
        below = (1 - share) * math.log(beta3) + share * math.log(beta1)
        return min(math.exp(math.log(beta1) * math.log(beta3) / below), beta3)

    def direction(t: int, g: Array) -> Array:
        nonlocal fast, slow, v
        alpha_t = alpha if alpha_warmup is None else min(t * alpha / alpha_warmup, alpha)
        fast = beta1 * fast + (1 - beta1) * g
        slow = beta3_at(t) * slow + (1 - beta3_at(t)) * g
        v = beta2 * v + (1 - beta2) * g**2
        return divided(fast / (1 - beta1**t) + alpha_t * slow, np.sqrt(v / (1 - beta2**t)), eps, division)

    return descend(theta, gradients, direction, lr, **around)
