"""The optimizers around Muon, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from reference.adamw import adamw
from reference.muon import YOU, matrices, newton_schulz, polar, scale
from reference.options import Array, cautious, decayed, divided, warmed_up

Direction = Callable[[int, Array, Array], Array]


def walk(
    theta: Array,
    gradients: Iterable[Array],
    direction: Direction,
    *,
    lr: float,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    maximize: bool = False,
    caution: bool = False,
    cautious_weight_decay: bool = False,
    apply: Callable[[Array, Array, float], Array] = lambda theta, u, lr: theta - lr * u,
) -> Array:
    """``apply(theta, u + weight_decay theta, lr_t)`` for each gradient, with ``u = direction(t, g, theta)``; t from 1."""
    theta = np.array(theta, dtype=np.float64)
    for t, g in enumerate(gradients, start=1):
        g = -g if maximize else g
        u = direction(t, g, theta)
        if caution:
            u = cautious(u, g)
        theta = apply(theta, decayed(u, theta, weight_decay, cautious_weight_decay), warmed_up(lr, t, warmup_steps))
    return theta


def is_matrix(theta: Array) -> bool:
    """Two dimensions or more that are larger than 1."""
    return int(np.sum(np.array(np.shape(theta)) > 1)) > 1


class LaProp:
    """Ziyin, Wang and Ueda 2020, LaProp (arXiv:2002.04839), Algorithm 1: the direction of each gradient in turn."""

    def __init__(self, betas: tuple[float, float], eps: float, division: str) -> None:
        self.mu, self.nu, self.eps, self.division = *betas, eps, division
        self.m: Any = 0.0
        self.n: Any = 0.0

    def __call__(self, t: int, g: Array) -> Array:
        self.n = self.nu * self.n + (1 - self.nu) * g**2
        normalised = divided(g, np.sqrt(self.n / (1 - self.nu**t)), self.eps, self.division)
        self.m = self.mu * self.m + (1 - self.mu) * normalised
        return np.asarray(self.m / (1 - self.mu**t))


def muon_laprop(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    method: str = "newton_schulz",
    ns_steps: int = 5,
    coefficients: Sequence[tuple[float, float, float]] = YOU,
    scaling: str = "scale",
    flatten: bool = True,
    split_sizes: Sequence[int] | None = None,
    division: str = "eps_clamp",
    **around: Any,
) -> Array:
    """HeavyBall's rule: Jordan's orthogonal factor, of LaProp's update where Muon has that of a momentum."""
    laprop = LaProp(betas, eps, division)

    def factor(x: Array) -> Array:
        o = polar(x) if method == "exact" else newton_schulz(x, coefficients, ns_steps, eps)
        return scale(x, o, scaling) * o

    def direction(t: int, g: Array, theta: Array) -> Array:
        u = laprop(t, g)
        return matrices(u, flatten, split_sizes, factor) if is_matrix(theta) else u

    return walk(theta, gradients, direction, lr=lr, **around)


def across(x: Array, theta: Array) -> Array:
    """What is left of ``x`` at right angles to ``theta``, with the norm of ``x``: Prieto et al. 2025 (arXiv:2501.04697).

    A basis of the complement is had from a QR decomposition that begins with ``theta``. Of a single number nothing would be
    left, and it is handed back.
    """
    if x.size < 2 or not theta.any():
        return x
    columns = np.column_stack([theta.ravel(), np.eye(x.size)])
    basis = np.linalg.qr(columns)[0][:, 1:]
    rest = basis @ (basis.T @ x.ravel())
    left, norm = np.linalg.norm(rest), np.linalg.norm(x)
    return (rest * (norm / left) if left > 1e-12 * norm else 0 * rest).reshape(x.shape)


def ortho_laprop(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    division: str = "eps_clamp",
    after: bool = False,
    **around: Any,
) -> Array:
    """OrthoGrad of the gradient before LaProp, or ``after`` it of LaProp's update."""
    laprop = LaProp(betas, eps, division)

    def direction(t: int, g: Array, theta: Array) -> Array:
        return across(laprop(t, g), theta) if after else laprop(t, across(g, theta))

    return walk(theta, gradients, direction, lr=lr, **around)


def hyperball_adamw(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    division: str = "eps_clamp",
    **around: Any,
) -> Array:
    """Wen et al. 2025, Hyperball Optimization, with Adam's update for ``u`` and ``R`` the norm of the first weights::

        theta_t = R normalize(theta_{t-1} - lr_t R normalize(u_t + lambda theta_{t-1}))

    for matrices; AdamW for all else.
    """
    if not is_matrix(theta):
        return adamw(theta, gradients, lr=lr, betas=betas, eps=eps, division=division, **around)
    beta1, beta2 = betas
    radius = float(np.linalg.norm(theta))
    m, v = np.zeros_like(theta), np.zeros_like(theta)

    def direction(t: int, g: Array, theta: Array) -> Array:
        nonlocal m, v
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        return divided(m / (1 - beta1**t), np.sqrt(v / (1 - beta2**t)), eps, division)

    def turned(theta: Array, u: Array, lr: float) -> Array:
        q = theta - lr * radius * u / np.linalg.norm(u) if u.any() else theta
        return radius * q / np.linalg.norm(q)

    return walk(theta, gradients, direction, lr=lr, apply=turned, **around)


def scion(
    theta: Array,
    gradients: Iterable[Array],
    *,
    lr: float = 0.0025,
    momentum: float = 0.9,
    eps: float = 1e-8,
    radius: float = 1.0,
    norm: str = "spectral",
    method: str = "newton_schulz",
    ns_steps: int = 5,
    coefficients: Sequence[tuple[float, float, float]] = YOU,
    flatten: bool = True,
    split_sizes: Sequence[int] | None = None,
    division: str = "eps_clamp",
    **around: Any,
) -> Array:
    """Pethick et al. 2025 (arXiv:2502.07529), Algorithm 1 and the oracles of its tables::

    d_t     = momentum d_{t-1} + (1 - momentum) g_t
    x_t     = x_{t-1} + lr_t lmo(d_t)
    lmo(d)  = -radius sqrt(d_out / d_in) U V^T                       weights
              -radius sqrt(d_out / d_in) U V^T / k^2                 convolutions, U V^T of (d_out, d_in k^2)
              -radius sign(d) / d_in                                 weights, norm "sign"
              -radius d / rms(d)                                     biases
    """
    d = np.zeros_like(theta)

    def lmo(x: Array) -> Array:
        fan_out, fan_in, *window = x.shape
        places = int(np.prod(window))
        if norm == "sign":
            return radius * np.sign(x) / (fan_in * places)
        flat = x.reshape(fan_out, -1)
        o = polar(flat) if method == "exact" else newton_schulz(flat, coefficients, ns_steps, eps)
        return radius * (fan_out / fan_in) ** 0.5 / places * o.reshape(x.shape)

    def parts(x: Array) -> Array:
        if not flatten and x.ndim > 2:
            return np.stack([parts(part) for part in x])
        ends = np.cumsum(split_sizes if split_sizes else [len(x)])
        return np.concatenate([lmo(band) for band in np.split(x, ends[:-1])])

    def direction(t: int, g: Array, theta: Array) -> Array:
        nonlocal d
        d = momentum * d + (1 - momentum) * g
        return parts(d) if d.ndim > 1 else radius * divided(d, np.sqrt(np.mean(d**2)), eps, division)

    return walk(theta, gradients, direction, lr=lr, **around)
