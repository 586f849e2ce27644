"""Stochastic gradient descent with momentum in float64."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from reference.options import Array, cautious, decayed, warmed_up


def sgd(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    momentum: float = 0.9,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    caution: bool = False,
    cautious_weight_decay: bool = False,
    warmup_steps: int = 0,
) -> Array:
    """Sutskever et al. 2013, On the importance of initialization and momentum in deep learning, in torch.optim.SGD's form::

        g_t     = g_t + lambda theta_{t-1}                              if the decay is coupled
        b_1     = g_1;  b_t = mu b_{t-1} + (1 - tau) g_t
        u_t     = g_t + mu b_t  with Nesterov's momentum, else  b_t
        theta_t = theta_{t-1} - lr_t u_t

    A decoupled decay is added to ``u_t`` instead, as in Loshchilov and Hutter 2019 (arXiv:1711.05101), Algorithm 1.
    Returns the parameter after the last gradient.
    """
    theta = np.array(theta, dtype=np.float64)
    b = np.zeros_like(theta)
    for t, arrived in enumerate(gradients, start=1):
        arrived = -arrived if maximize else arrived
        g = arrived if decoupled else arrived + weight_decay * theta
        b = g if t == 1 else momentum * b + (1 - dampening) * g
        u = g + momentum * b if nesterov else b
        if caution:
            u = cautious(u, arrived)
        if decoupled:
            u = decayed(u, theta, weight_decay, cautious_weight_decay)
        theta = theta - warmed_up(lr, t, warmup_steps) * u
    return theta
