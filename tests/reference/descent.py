"""What surrounds a rule, in float64: the loop over the gradients, decay, learning rate and warm-up."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from reference.options import Array, cautious, decayed, warmed_up


def descend(
    theta: Array,
    gradients: Iterable[Array],
    direction: Callable[[int, Array], Array],
    lr: float,
    *,
    weight_decay: float = 0.0,
    coupled: bool = False,
    warmup_steps: int = 0,
    maximize: bool = False,
    caution: bool = False,
    cautious_weight_decay: bool = False,
) -> Array:
    """``theta - lr_t (u + weight_decay theta)`` for each gradient, with ``u = direction(t, g)``; ``t`` counts from 1.

    ``coupled`` hands ``g + weight_decay theta`` to the rule instead. Returns the parameter after the last gradient.
    """
    theta = np.array(theta, dtype=np.float64)
    for t, g in enumerate(gradients, start=1):
        g = -g if maximize else g
        u = direction(t, g + weight_decay * theta if coupled else g)
        if caution:
            u = cautious(u, g)
        u = decayed(u, theta, 0.0 if coupled else weight_decay, cautious_weight_decay)
        theta = theta - warmed_up(lr, t, warmup_steps) * u
    return theta
