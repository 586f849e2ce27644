"""What PSGD's Kronecker and low-rank forms share: the schedule of refreshes, the dampening, and the momentum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hb_psgd.checks import check_number
from hbcore.api import Context, Curvature, Slot, State, Transform, debiased, hyper, zeros

Probability: TypeAlias = "float | Callable[[int], float] | None"

EPS = torch.finfo(torch.float32).eps
"""The dampening relative to the gradient: float32's rounding unit for every dtype."""


def update_probability(k: int) -> float:
    """The default number of refreshes per step k (1, 2, ...): 1 for 1000 steps, then less, finally 0.03.

    ``max(0.03, min(1, 0.999^(k - 1000)))``
    """
    return max(0.03, min(1.0, 0.999 ** (k - 1000)))


def refresh_rate(probability: Probability, k: int) -> float:
    """The number of refreshes at step k that the option asks for, in [0, 1]; None is :func:`update_probability`.

    Raises:
        HyperparameterError: a function returned something else than a number.
    """
    if probability is None:
        return update_probability(k)
    if not callable(probability):
        return float(probability)
    check_number("preconditioner_update_probability", rate := probability(k))
    return min(1.0, max(0.0, float(rate)))


def curvature_of(t: Any) -> Curvature:
    """How products are made for a rule with HeavyBall's options."""
    return Curvature(t.hvp_interval, t.finite_differences, t.fallback_to_finite_differences)


def pair_of(t: Any, c: Context) -> tuple[Tensor, Tensor] | None:
    """A rule's Hessian-vector products and their vectors of this step; None if it has none."""
    h, v = (c.hvp, c.vector) if t.hessian_approx else (None, None)
    return None if h is None or v is None else (h, v)


@dataclass(frozen=True)
class DebiasedAverage(Transform):
    r"""A running average, corrected for its start at zero: :math:`m_t = \beta m_{t-1} + (1 - \beta) g_t`, :math:`m_t / (1 -
    \beta^t)`."""

    beta: float = hyper(0.9, ge=0, lt=1, role="first_moment")
    name = "debiased_average"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        m, corrected = debiased(s["exp_avg"], u, self.beta, c.step)
        return corrected, {"exp_avg": m}
