"""ADOPT in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.descent import descend
from reference.options import Array, divided, warmed_up


def adopt(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    division: str = "eps_clamp",
    warmup_steps: int = 0,
    **around: Any,
) -> Array:
    """Taniguchi et al. 2024, ADOPT (arXiv:2411.02853), Algorithm 1, whose gradients count from 0::

        v_0     = g_0^2
        m_t     = beta_1 m_{t-1} + (1 - beta_1) g_t / max(sqrt(v_{t-1}), eps)
        theta_t = theta_{t-1} - lr m_t
        v_t     = beta_2 v_{t-1} + (1 - beta_2) g_t^2

    The warm-up counts every gradient, the first too.
    """
    beta1, beta2 = betas
    first, *rest = [np.asarray(g, dtype=np.float64) for g in gradients]
    m, v = np.zeros_like(first), first**2

    def direction(t: int, g: Array) -> Array:
        nonlocal m, v
        m = beta1 * m + (1 - beta1) * divided(g, np.sqrt(v), eps, division)
        v = beta2 * v + (1 - beta2) * g**2
        return m

    for t, g in enumerate(rest, start=2):
        theta = descend(theta, [g], direction, warmed_up(lr, t, warmup_steps), **around)
    return theta
