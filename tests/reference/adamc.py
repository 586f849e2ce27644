"""AdamC in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from reference.options import Array, decayed, divided, warmed_up


def adamc(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float | Sequence[float] = 0.0025,
    max_lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    cautious_weight_decay: bool = False,
    warmup_steps: int = 0,
) -> Array:
    """Defazio 2025, Why Gradients Rapidly Increase Near the End of Training (arXiv:2506.02285), Algorithm 1::

        lambda_t = lambda gamma_t / gamma_max
        theta_t  = theta_{t-1} - gamma_t (m_hat_t / sqrt(v_hat_t) + lambda_t theta_{t-1})

    with Adam's moments. ``gamma_t`` is ``lr``, or its ``t``-th element, after warm-up.
    """
    beta1, beta2 = betas
    theta = np.array(theta, dtype=np.float64)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        gamma = warmed_up(lr if isinstance(lr, (int, float)) else lr[t - 1], t, warmup_steps)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = divided(m / (1 - beta1**t), np.sqrt(v / (1 - beta2**t)), eps)
        theta = theta - gamma * decayed(u, theta, weight_decay * gamma / max_lr, cautious_weight_decay)
    return theta
