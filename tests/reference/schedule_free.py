"""Schedule-free AdamW in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from reference.options import Array, cautious, decayed, divided, warmed_up


class Weights(NamedTuple):
    """``y``, where gradients are taken; ``x``, the average to evaluate with; ``z``, the base sequence."""

    y: Array
    x: Array
    z: Array


def schedule_free_adamw(
    theta: Array,
    gradients: Iterable[Array | None],
    *,
    lr: float | Sequence[float] = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    warmup_steps: int = 0,
    division: str = "eps_clamp",
    maximize: bool = False,
    caution: bool = False,
    cautious_weight_decay: bool = False,
    clip_update: Callable[[Array], Array] = lambda u: u,
) -> Weights:
    """Defazio et al. 2024, The Road Less Scheduled (arXiv:2405.15682), Algorithm 1::

        y_t     = (1 - beta_1) z_t + beta_1 x_t
        g_t     = gradient at y_t
        v_t     = beta_2 v_{t-1} + (1 - beta_2) g_t^2
        z_{t+1} = z_t - gamma_t g_t / (sqrt(v_t) + eps) - gamma_t lambda y_t
        c_{t+1} = gamma_t^2 / sum_{i <= t} gamma_i^2
        x_{t+1} = (1 - c_{t+1}) x_t + c_{t+1} z_{t+1}

    with three changes of the authors' library. The correction ``1 - beta_2^t`` is made to ``v``, not to ``gamma``, and so
    does not enter ``c``. ``c`` is made of ``t^r (max_{i <= t} gamma_i)^weight_lr_power`` rather than of ``gamma_t^2``, and is
    0 as long as that sum is.

    Args:
        gradients: None for a step that the parameter sits out while others of its group take it.
        lr: before warm-up; one for all steps, or one for each.
    """
    beta1, beta2 = betas
    x = np.array(theta, dtype=np.float64)
    z, v, seen = x.copy(), np.zeros_like(x), 0
    lr_max, weight_sum = 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        gamma = warmed_up(lr if isinstance(lr, float) else lr[t - 1], t, warmup_steps)
        lr_max = max(lr_max, gamma)
        weight = t**r * lr_max**weight_lr_power
        weight_sum += weight
        c = weight / weight_sum if weight_sum > 0 else 0.0
        if g is None:
            continue
        g = -g if maximize else g
        seen += 1
        y = (1 - beta1) * z + beta1 * x
        v = beta2 * v + (1 - beta2) * g**2
        u = clip_update(divided(g, np.sqrt(v / (1 - beta2**seen)), eps, division))
        if caution:
            u = cautious(u, g)
        u = decayed(u, y, weight_decay, cautious_weight_decay)
        z = z - gamma * u
        x = (1 - c) * x + c * z
    return Weights((1 - beta1) * z + beta1 * x, x, z)
