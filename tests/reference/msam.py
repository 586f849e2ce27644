"""Momentum-SAM on LaProp in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from reference.options import Array, cautious, decayed, divided, warmed_up


class Weights(NamedTuple):
    """``p``, where the gradient is taken; ``w``, what is trained. One array for each parameter of the model."""

    p: list[Array]
    w: list[Array]


def msam_laprop(
    theta: Sequence[Array],
    gradients: Iterable[Sequence[Array | None]],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-6,
    sam_step_size: float = 0.1,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    division: str = "eps_clamp",
    maximize: bool = False,
    caution: bool = False,
    cautious_weight_decay: bool = False,
) -> Weights:
    """Becker, Altrock and Risse 2024, Momentum-SAM (arXiv:2401.12033), Algorithm 1, rho for ``sam_step_size``::

        g_t = gradient at p_{t-1}
        v_t = momentum of the gradients
        w_t = w_{t-1} - lr v_t
        p_t = w_t - rho v_t / ||v_t||,  the norm that of all parameters' v_t together

    with LaProp's momentum (arXiv:2002.04839), ``mu m + (1 - mu) g / sqrt(n / (1 - nu^t))`` over ``1 - mu^t``, for ``v``. The
    second copy of the weights, ``w``, is kept as it stands here.

    Args:
        gradients: for each step one array for each parameter; None for a parameter that sits it out.
    """
    mu, nu = betas
    w = [np.array(x, dtype=np.float64) for x in theta]
    p, counts = [x.copy() for x in w], [0] * len(w)
    m, n = ([np.zeros_like(x) for x in w] for _ in range(2))
    for grads in gradients:
        step: dict[int, Array] = {}
        for i, g in enumerate(grads):
            if g is None:
                continue
            g = -g if maximize else g
            counts[i] += 1
            n[i] = nu * n[i] + (1 - nu) * g**2
            m[i] = mu * m[i] + (1 - mu) * divided(g, np.sqrt(n[i] / (1 - nu ** counts[i])), eps, division)
            step[i] = m[i] / (1 - mu ** counts[i])
            if caution:
                step[i] = cautious(step[i], g)
        norm = np.linalg.norm(np.concatenate([u.ravel() for u in step.values()]))
        for i, u in step.items():
            w[i] = w[i] - warmed_up(lr, counts[i], warmup_steps) * decayed(u, w[i], weight_decay, cautious_weight_decay)
            p[i] = w[i] - (sam_step_size / norm * u if norm > 0 else 0.0)
    return Weights(p, w)
