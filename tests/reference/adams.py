"""Adams in float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from reference.options import Array, cautious, decayed, warmed_up


class Outcome(NamedTuple):
    """The parameter, and the vectors of the power iteration, ``(*batch, M)``; None without spectral decay."""

    theta: Array
    u: Array | None


def adams(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    scalar_vector_weight_decay: float = 0.1,
    use_spectral_decay: bool = True,
    warmup_steps: int = 0,
    maximize: bool = False,
    caution: bool = False,
    cautious_weight_decay: bool = False,
) -> Outcome:
    """The pseudo-code of https://github.com/imoneoi/Adams, and its description of the decay, for matrices W of M x N::

        v       = W^T u / ||W^T u||,  u = W v / ||W v||,  sigma = u^T W v      u from the last step, first all ones
        m_hat   = m / (1 - beta_1^t),  n_hat = n / (1 - beta_2^t)             Adam's moments
        theta_t = theta_{t-1} - lr (atan2(m_hat, sqrt(n_hat)) + lambda sqrt(M) sigma u v^T)

    The last two dimensions are the matrix; one of size 1, or no second one, means ``lambda theta_{t-1}`` for the last term.
    """
    beta1, beta2 = betas
    theta = np.array(theta, dtype=np.float64)
    m, n = np.zeros_like(theta), np.zeros_like(theta)
    spectral = use_spectral_decay and theta.ndim >= 2 and theta.shape[-1] != 1 and theta.shape[-2] != 1
    u = np.ones(theta.shape[:-1]) if spectral else None
    for t, g in enumerate(gradients, start=1):
        g = -g if maximize else g
        m = beta1 * m + (1 - beta1) * g
        n = beta2 * n + (1 - beta2) * g**2
        step = np.arctan2(m / (1 - beta1**t), np.sqrt(n / (1 - beta2**t)))
        if caution:
            step = cautious(step, g)
        if u is None:
            step = decayed(step, theta, scalar_vector_weight_decay, cautious_weight_decay)
        else:
            term = np.zeros_like(theta)
            for index in np.ndindex(*theta.shape[:-2]):
                w = theta[index]
                v = w.T @ u[index] / np.linalg.norm(w.T @ u[index])
                u[index] = w @ v / np.linalg.norm(w @ v)
                sigma = u[index] @ w @ v
                term[index] = np.sqrt(w.shape[0]) * sigma * np.outer(u[index], v)
            step = decayed(step, term, weight_decay, cautious_weight_decay)
        theta = theta - warmed_up(lr, t, warmup_steps) * step
    return Outcome(theta, u)
