"""AdamW in float64."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from reference.options import Array, cautious, decayed, divided, warmed_up


def adamw(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    division: str = "eps_clamp",
    atan2_scale: float = 16.0,
    maximize: bool = False,
    caution: bool = False,
    cautious_weight_decay: bool = False,
    warmup_steps: int = 0,
) -> Array:
    """Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization (arXiv:1711.05101), Algorithm 2::

        m_t     = beta_1 m_{t-1} + (1 - beta_1) g_t
        v_t     = beta_2 v_{t-1} + (1 - beta_2) g_t^2
        m_hat   = m_t / (1 - beta_1^t)
        v_hat   = v_t / (1 - beta_2^t)
        theta_t = theta_{t-1} - lr_t (m_hat / sqrt(v_hat) + lambda theta_{t-1})

    with the paper's schedule multiplier and step size together in ``lr_t``, and the division done as ``division`` says.
    Returns the parameter after the last gradient.
    """
    beta1, beta2 = betas
    theta = np.array(theta, dtype=np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        g = -g if maximize else g
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        u = divided(m_hat, np.sqrt(v_hat), eps, division, atan2_scale)
        if caution:
            u = cautious(u, g)
        u = decayed(u, theta, weight_decay, cautious_weight_decay)
        theta = theta - warmed_up(lr, t, warmup_steps) * u
    return theta
