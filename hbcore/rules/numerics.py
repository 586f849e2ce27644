"""Formulas shared by most rules. Pure, elementwise, any floating dtype."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = "Tensor | float"
"""A hyperparameter: a plain number at construction, a 0-d float64 tensor inside ``update``."""


def at_least(x: Tensor, least: Scalar) -> Tensor:
    """``max(x, least)``, for matrix rules: their hyperparameters stay on the CPU, and torch clamps on one device only."""
    return torch.maximum(x, least) if isinstance(least, Tensor) else x.clamp(min=least)


def ema(old: Tensor, new: Tensor, beta: Scalar) -> Tensor:
    """Exponential moving average, ``beta * old + (1 - beta) * new``, written so that ``old == new`` returns it exactly."""
    return old + (new - old) * (1 - beta)


def debiased(old: Tensor, new: Tensor, beta: Scalar, step: Tensor) -> tuple[Tensor, Tensor]:
    """The moving average, raw and corrected for its initialisation at zero.

    ``m = beta m + (1 - beta) x`` and ``m / (1 - beta^t)``: Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1.
    """
    return _with_correction(ema(old, new, beta), beta, step)


def second_moment(old: Tensor, x: Tensor, beta: Scalar) -> Tensor:
    """The moving average of squares, ``beta * old + (1 - beta) * x^2``.

    The factor is applied before the second ``x``, as in torch.optim, which gives large gradients more room. An element that
    overflows all the same stays infinite, so that it stops moving and the others go on; the average alone would be inf - inf
    one step later.
    """
    rate = 1 - beta
    return torch.where(old == math.inf, old, old + (x * rate * x - old * rate))


def debiased_second_moment(old: Tensor, x: Tensor, beta: Scalar, step: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`second_moment`, raw and corrected for its initialisation at zero, as in :func:`debiased`."""
    return _with_correction(second_moment(old, x, beta), beta, step)


def _with_correction(average: Tensor, beta: Scalar, step: Tensor) -> tuple[Tensor, Tensor]:
    return average, average * (1 / (1 - beta**step))  # the reciprocal is a scalar: elements only multiply


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a parameter of ``dtype`` is updated in: float64 for float64 and complex128, float32 otherwise."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
