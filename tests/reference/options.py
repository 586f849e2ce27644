"""The options that every optimizer shares, in float64, each as its paper or its authors' code has it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def cautious(u: Array, g: Array) -> Array:
    """Liang et al. 2024, Cautious Optimizers (arXiv:2411.16085), Algorithm 1, as in the authors' code::

    mask = (u * g > 0)
    u = u * mask / mask.mean().clamp(min=1e-3)
    """
    kept = [1.0 if ui * gi > 0 else 0.0 for ui, gi in zip(u.ravel(), g.ravel(), strict=True)]
    mean = sum(kept) / len(kept)
    return u * np.array(kept).reshape(u.shape) / max(mean, 1e-3)


def decayed(u: Array, p: Array, weight_decay: float, only_where_they_agree: bool = False) -> Array:
    """Loshchilov and Hutter 2019 (arXiv:1711.05101): ``u + lambda p``.

    With ``only_where_they_agree``, Chen et al. 2025, Cautious Weight Decay (arXiv:2510.12402), Algorithm 1:
    ``u + lambda * 1[u p > 0] * p``.
    """
    if not only_where_they_agree:
        return u + weight_decay * p
    terms = [weight_decay * pi if ui * pi > 0 else 0.0 for ui, pi in zip(u.ravel(), p.ravel(), strict=True)]
    return u + np.array(terms).reshape(p.shape)


def warmed_up(lr: float, t: int, warmup_steps: int) -> float:
    """Linear warm-up over ``N`` steps: ``lr * min(1, t / (N + 1))``, ``t`` counted from 1."""
    return lr * min(1.0, t / (warmup_steps + 1))


def divided(x: Array, y: Array, eps: float, how: str = "eps_clamp", scale: float = 16.0) -> Array:
    """``x / y`` for ``y >= 0``, four ways.

    ``eps_add`` is Kingma and Ba's ``x / (y + eps)``; ``eps_clamp`` is ``x / max(y, eps)``; ``atan2`` is Everett et al. 2024
    (arXiv:2407.05872), ``scale * atan2(x / scale, y)``; ``nan_to_0`` is ``x / y``, and 0 where that is not finite.
    """
    if how == "eps_add":
        return x / (y + eps)
    if how == "eps_clamp":
        return x / np.maximum(y, eps)
    if how == "atan2":
        return scale * np.arctan2(x / scale, y)
    assert how == "nan_to_0", how
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = x / y
    return np.where(np.isfinite(quotient), quotient, 0.0)
