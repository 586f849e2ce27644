"""Clippings in float64. ``x`` is a list of tensors, the whole model; ``p`` the parameters that belong to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from reference.options import Array

Model = Sequence[Array]


def norm(x: Array) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in np.ravel(x)))


def scaled_down(x: Array, size: float, threshold: float) -> Array:
    """``x min(1, threshold / size)``."""
    return x if size <= threshold else x * (threshold / size)


def l2(x: Model, p: Model, threshold: float = 1.0) -> list[Array]:
    """Pascanu et al. 2013 (arXiv:1211.5063), Algorithm 1, for each tensor."""
    return [scaled_down(a, norm(a), threshold) for a in x]


def rms(x: Model, p: Model, threshold: float = 1.0) -> list[Array]:
    """The same with ``RMS(x) = sqrt(mean(x^2))``; Shazeer and Stern 2018 (arXiv:1804.04235), section 6."""
    return [scaled_down(a, norm(a) / math.sqrt(a.size), threshold) for a in x]


def global_l2(x: Model, p: Model, threshold: float = 1.0) -> list[Array]:
    size = math.sqrt(sum(norm(a) ** 2 for a in x))
    return [scaled_down(a, size, threshold) for a in x]


def global_rms(x: Model, p: Model, threshold: float = 1.0) -> list[Array]:
    size = math.sqrt(sum(norm(a) ** 2 for a in x) / sum(a.size for a in x))
    return [scaled_down(a, size, threshold) for a in x]


def adaptive(x: Model, p: Model, threshold: float = 0.1) -> list[Array]:
    """Brock et al. 2021 (arXiv:2102.06171), equation 3, with ``||p||* = max(||p||, 1e-3)`` and whole tensors for units."""
    return [scaled_down(a, norm(a), threshold * max(norm(b), 1e-3)) for a, b in zip(x, p, strict=True)]


def elementwise(formula: Callable[..., float]) -> Callable[..., list[Array]]:
    def apply(x: Model, p: Model, *numbers: float) -> list[Array]:
        return [np.array([formula(float(v), *numbers) for v in a.ravel()]).reshape(a.shape) for a in x]

    return apply


@elementwise
def trust_region(x: float, bound: float = 2.0, scale: float = 1.5, lerp: float = 0.9) -> float:
    """``s ((1 - l) sgn(x) log(1 + |x/s|) + l tanh(x/s))``, clamped to ``[-bound, bound]``."""
    y = x / scale
    z = scale * ((1 - lerp) * math.copysign(math.log1p(abs(y)), y) + lerp * math.tanh(y))
    return min(max(z, -bound), bound)


@elementwise
def a_law(x: float, a: float = 87.6) -> float:
    """ITU-T G.711: ``sgn(x) A|x| / (1 + ln A)`` below ``1 / A``, ``sgn(x) (1 + ln(A|x|)) / (1 + ln A)`` from there on."""
    y = abs(x) * a
    return math.copysign((y if y < 1 else 1 + math.log(y)) / (1 + math.log(a)), x)


@elementwise
def mu_law(x: float, mu: float = 127.0) -> float:
    """ITU-T G.711: ``sgn(x) ln(1 + mu |x|) / ln(1 + mu)``."""
    return math.copysign(math.log(1 + mu * abs(x)) / math.log(1 + mu), x)


@elementwise
def softsign(x: float, bound: float = 2.0) -> float:
    return bound * x / (1 + abs(x))


BY_NAME: dict[str, Callable[..., list[Array]]] = {
    "l2_clip_": l2,
    "rmsnorm_clip_": rms,
    "global_l2norm_clip": global_l2,
    "global_rmsnorm_clip": global_rms,
    "adaptive_gradient_clipping_": adaptive,
    "trust_region_clip_": trust_region,
    "a_law_compress": a_law,
    "mu_law_compress": mu_law,
    "softsign_compress": softsign,
}
