"""Muon in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from reference.adamw import adamw
from reference.options import Array, decayed, warmed_up

JORDAN = [(3.4445, -4.7750, 2.0315)]
YOU = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]


def newton_schulz(x: Array, coefficients: Sequence[tuple[float, float, float]], steps: int = 5, eps: float = 1e-8) -> Array:
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, seen in the basis of singular vectors::

        X / max(||X||_F, eps) = U diag(sigma) V^T
        sigma <- a sigma + b sigma^3 + c sigma^5      once a step
        result = U diag(sigma) V^T

    with the step's own row of coefficients, or the last one where there are fewer rows than steps. The iteration itself
    multiplies matrices: nothing of it is repeated here.
    """
    u, s, vt = np.linalg.svd(x / max(float(np.sqrt(np.sum(x**2))), eps), full_matrices=False)
    for k in range(steps):
        a, b, c = coefficients[min(k, len(coefficients) - 1)]
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def polar(x: Array) -> Array:
    """``U V^T`` of ``x = U diag(sigma) V^T``, without the directions in which ``x`` is zero."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    rank = int(np.sum(s > 1e-13 * max(float(s[0]), 1e-300)))
    return u[:, :rank] @ vt[:rank]


def scale(x: Array, orthogonal: Array, how: str) -> float:
    """What an orthogonal factor is multiplied by.

    ``scale`` is Jordan's and torch's "original", ``match_rms_adamw`` is Liu et al. 2025 (arXiv:2502.16982), section 2.2,
    ``graft`` gives the update back the norm that it had.
    """
    m, n = x.shape
    if how == "graft":
        return float(np.sqrt(np.sum(x**2)) / np.sqrt(np.sum(orthogonal**2)))
    return {"none": 1.0, "scale": max(1.0, m / n) ** 0.5, "match_rms_adamw": 0.2 * max(m, n) ** 0.5}[how]


def matrices(x: Array, flatten: bool, split_sizes: Sequence[int] | None, function: Callable[[Array], Array]) -> Array:
    """``function`` of each matrix that a weight consists of.

    A weight with more than two dimensions is one matrix of its first by all others, or with ``flatten=False`` many matrices of
    its last two. Either is cut into bands of ``split_sizes`` rows.
    """
    if not flatten and x.ndim > 2:
        return np.stack([matrices(part, flatten, split_sizes, function) for part in x])
    rows = x.reshape(x.shape[0], -1)
    ends = np.cumsum(split_sizes if split_sizes else [rows.shape[0]])
    return np.concatenate([function(band) for band in np.split(rows, ends[:-1])]).reshape(x.shape)


def muon(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    momentum: float | None = None,
    nesterov: bool = True,
    heavyball_momentum: bool = False,
    method: str = "newton_schulz",
    ns_steps: int = 5,
    coefficients: Sequence[tuple[float, float, float]] = YOU,
    scaling: str = "scale",
    flatten: bool = True,
    split_sizes: Sequence[int] | None = None,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
) -> Array:
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with torch.optim.Muon's averages::

        B_t     = mu B_{t-1} + (1 - mu) G_t
        N_t     = (1 - mu) G_t + mu B_t         with Nesterov's momentum, else  B_t
        O_t     = orthogonal factor of N_t
        theta_t = theta_{t-1} - lr_t (s O_t + lambda theta_{t-1})

    or with sums, as the post has it: ``B_t = mu B_{t-1} + G_t`` and ``N_t = G_t + mu B_t``. Whatever has fewer than two
    dimensions larger than 1 is trained with Adam. Returns the parameter after the last gradient.
    """
    if np.sum(np.array(np.shape(theta)) > 1) < 2:
        return adamw(theta, gradients, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, warmup_steps=warmup_steps)
    mu = betas[0] if momentum is None else momentum
    fresh = 1.0 if heavyball_momentum else 1 - mu
    theta = np.array(theta, dtype=np.float64)
    b = np.zeros_like(theta)

    def step_of(x: Array) -> Array:
        o = polar(x) if method == "exact" else newton_schulz(x, coefficients, ns_steps, eps)
        return scale(x, o, scaling) * o

    for t, g in enumerate(gradients, start=1):
        b = mu * b + fresh * g
        n = fresh * g + mu * b if nesterov else b
        u = decayed(matrices(n, flatten, split_sizes, step_of), theta, weight_decay)
        theta = theta - warmed_up(lr, t, warmup_steps) * u
    return theta
