"""RMSprop in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from reference.descent import descend
from reference.options import Array, divided


def rmsprop(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    alpha: float = 0.99,
    eps: float = 1e-6,
    momentum: float = 0.0,
    centered: bool = False,
    debias: bool = True,
    division: str = "eps_clamp",
    **around: Any,
) -> Array:
    """Tieleman and Hinton 2012, lecture 6.5, with the momentum and the centring of Graves 2013 (arXiv:1308.0850)::

    n_t     = alpha n_{t-1} + (1 - alpha) g_t^2
    a_t     = alpha a_{t-1} + (1 - alpha) g_t
    d_t     = n_t, or n_t - a_t^2 if centred; over 1 - alpha^t if debiased
    b_t     = momentum b_{t-1} + g_t / sqrt(d_t)
    theta_t = theta_{t-1} - lr b_t
    """
    n, a, b = (np.zeros_like(theta) for _ in range(3))

    def direction(t: int, g: Array) -> Array:
        nonlocal n, a, b
        n = alpha * n + (1 - alpha) * g**2
        a = alpha * a + (1 - alpha) * g
        d = np.maximum(n - a**2, 0.0) if centered else n
        d = d / (1 - alpha**t) if debias else d
        b = momentum * b + divided(g, np.sqrt(d), eps, division)
        return b

    return descend(theta, gradients, direction, lr, **around)
