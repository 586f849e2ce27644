"""MARS in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from reference.options import Array


def mars(gradients: Iterable[Array], *, gamma: float = 0.0025, beta: float = 0.9, clip: bool = False) -> Iterator[Array]:
    """Yuan et al. 2024, MARS: Unleashing the Power of Variance Reduction (arXiv:2411.10438), Algorithm 1, approximate form::

        c_t  = g_t + gamma beta_1 / (1 - beta_1) (g_t - g_{t-1})
        c~_t = c_t / ||c_t||_2   if ||c_t||_2 > 1, else c_t

    for one tensor, the second line only with ``clip``. It starts from ``x_1 = x_0``, so that the first difference is zero.
    Yields one array a gradient.
    """
    previous = None
    for g in gradients:
        g = np.asarray(g, dtype=np.float64)
        change = np.zeros_like(g) if previous is None else g - previous
        c = g + gamma * (beta / (1 - beta)) * change
        norm = float(np.sqrt(np.sum(c**2)))
        yield c / norm if clip and norm > 1 else c
        previous = g
