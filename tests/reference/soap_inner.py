"""The rules that run in SOAP's eigenbasis, in float64, and what they are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from reference.adamw import adamw
from reference.ademamix import ademamix
from reference.laprop import laprop
from reference.nadam import nadam
from reference.options import Array, divided


@dataclass(frozen=True)
class Settings:
    """What the oracles of this module may be told.

    Attributes:
        inner: the rule in the basis: adam, nadam, ademamix, laprop, rms, or shampoo, which has no second moment.
        covariance: outer, the gradient's outer products; kl, those of the gradient whitened along the other dimensions.
        transport: how a second moment follows its basis: permute, or square; the latter makes kl use the pseudo-inverse.
        coupled: the weight decay is added to the gradient.
        schedule: ``(a, b)``; see the oracle ``soap``.
        split: cut what is longer than ``max_precond_dim``.
        init_factor: of shampoo's first factors.
    """

    inner: str = "adam"
    covariance: str = "outer"
    transport: str = "permute"
    lr: float = 0.003
    betas: tuple[float, ...] = (0.9, 0.95)
    shampoo_beta: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    coupled: bool = False
    warmup_steps: int = 0
    division: str = "eps_clamp"
    precondition_frequency: int = 2
    schedule: tuple[float, float] | None = None
    max_precond_dim: int = 2048
    merge_dims: bool = True
    precondition_1d: bool = False
    split: bool = False
    momentum_decay: float = 4e-3
    alpha: float = 2.0
    beta3_warmup: int | None = None
    alpha_warmup: int | None = None
    init_factor: float = 0.1
    r: float = 0.0
    weight_lr_power: float = 2.0


class Moments:
    """What the inner rule keeps: first moments, which turn with the basis, and a second; shampoo's first is kept outside."""

    def __init__(self, shape: tuple[int, ...], h: Settings) -> None:
        self.h = h
        self.first = [np.zeros(shape) for _ in range({"ademamix": 2, "rms": 0, "shampoo": 0}.get(h.inner, 1))]
        self.second = np.zeros(shape)
        self.outside = np.zeros(shape)

    def average(self, g: Array) -> Array:
        """Shampoo's first moment, not debiased."""
        self.outside = self.h.betas[0] * self.outside + (1 - self.h.betas[0]) * g
        return self.outside

    def lead(self, beta: float, g: Array, which: int = 0) -> Array:
        """A first moment with ``g`` in it."""
        self.first[which] = beta * self.first[which] + (1 - beta) * g
        return self.first[which]

    def root(self, t: int, g: Array) -> Array:
        """The root of the debiased second moment with ``g`` in it."""
        beta2 = self.h.betas[1]
        self.second = beta2 * self.second + (1 - beta2) * g**2
        return np.sqrt(self.second / (1 - beta2**t))


def adam(t: int, g: Array, s: Moments, h: Settings) -> Array:
    """Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1."""
    beta1 = h.betas[0]
    return divided(s.lead(beta1, g) / (1 - beta1**t), s.root(t, g), h.eps, h.division)


def nadam_in_basis(t: int, g: Array, s: Moments, h: Settings) -> Array:
    """Dozat 2016, as in the oracle ``nadam``."""
    mu = [h.betas[0] * (1 - 0.5 * 0.96 ** (i * h.momentum_decay)) for i in range(t + 2)]
    upto = math.prod(mu[1 : t + 1])
    m = s.lead(h.betas[0], g)
    m_hat = mu[t + 1] * m / (1 - upto * mu[t + 1]) + (1 - mu[t]) * g / (1 - upto)
    return divided(m_hat, s.root(t, g), h.eps, h.division)


def ademamix_in_basis(t: int, g: Array, s: Moments, h: Settings) -> Array:
    """Pagliardini, Ablin and Grangier 2024 (arXiv:2409.03137), as in the oracle ``ademamix``."""
    beta1, _, beta3 = h.betas
    alpha = h.alpha * (1.0 if h.alpha_warmup is None else min(1.0, t / h.alpha_warmup))
    if h.beta3_warmup is not None and t < h.beta3_warmup:
        share = t / h.beta3_warmup
        log1, log3 = math.log(beta1), math.log(beta3)
        beta3 = min(beta3, math.exp(log1 * log3 / ((1 - share) * log3 + share * log1)))
    fast, slow = s.lead(beta1, g), s.lead(beta3, g, 1)
    return divided(fast / (1 - beta1**t) + alpha * slow, s.root(t, g), h.eps, h.division)


def laprop_in_basis(t: int, g: Array, s: Moments, h: Settings) -> Array:
    """Ziyin, Wang and Ueda 2020 (arXiv:2002.04839), Algorithm 1."""
    beta1 = h.betas[0]
    return s.lead(beta1, divided(g, s.root(t, g), h.eps, h.division)) / (1 - beta1**t)


def rms(t: int, g: Array, s: Moments, h: Settings) -> Array:
    """Adam's direction without a first moment."""
    return divided(g, s.root(t, g), h.eps, h.division)


INNER: dict[str, Callable[[int, Array, Moments, Settings], Array]] = {
    "adam": adam, "nadam": nadam_in_basis, "ademamix": ademamix_in_basis, "laprop": laprop_in_basis, "rms": rms,
}  # fmt: skip


def without_factors(theta: Array, gradients: Iterable[Array], h: Settings) -> Array:
    """The inner rule by itself, which moves from the first gradient on."""
    around = {
        "lr": h.lr, "betas": h.betas, "eps": h.eps, "weight_decay": h.weight_decay, "division": h.division,
        "warmup_steps": h.warmup_steps,
    }  # fmt: skip
    if h.inner == "nadam":
        return nadam(theta, gradients, momentum_decay=h.momentum_decay, coupled=h.coupled, **around)
    if h.inner == "ademamix":
        warmups = {"beta3_warmup": h.beta3_warmup, "alpha_warmup": h.alpha_warmup}
        return ademamix(theta, gradients, alpha=h.alpha, **warmups, **around)
    if h.inner == "laprop":
        return laprop(theta, gradients, **around)
    return adamw(theta, gradients, **around)
