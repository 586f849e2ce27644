"""ADOPT, Taniguchi et al. 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hbcore.api import (
    Context,
    Optimizer,
    Slot,
    State,
    Transform,
    ema,
    hyper,
    second_moment,
    zeros,
)


@dataclass(frozen=True)
class ScaleByADOPT(Transform):
    r"""ADOPT's direction, Taniguchi et al. 2024 (arXiv:2411.02853), Algorithm 1: no gradient is divided by its own square.

    .. math::
        v_1 = g_1^2 \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\sqrt{v_{t-1}}} \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \qquad u_t = m_t

    The first gradient, the paper's :math:`g_0`, only sets :math:`v`. Neither moment is bias-corrected.
    """

    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1, role=("first_moment", "second_moment"))
    eps: float = hyper(1e-8, ge=0)
    name = "adopt"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate"), "exp_avg_sq": zeros(param, "permute")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        later = (c.step - 1).clamp(max=1)  # 0 on the first step, then 1
        scale = (s["exp_avg_sq"] + (1 - later)).sqrt()  # 1 on the first step, whose quotient must be finite: 0 times it is 0
        m = ema(s["exp_avg"], c.divide(u, scale, self.eps) * later, b1)
        return m, {"exp_avg": m, "exp_avg_sq": second_moment(s["exp_avg_sq"], u, b2 * later)}


@dataclass(frozen=True)
class SkipFirstStep(Transform):
    """No movement on a parameter's first step, weight decay included."""

    name = "skip_first_step"
    stage = "lr"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u * (c.step - 1).clamp(max=1), {}


class ADOPT(Optimizer):
    r"""ADOPT, Taniguchi et al. 2024 (arXiv:2411.02853), Algorithm 1: Adam that converges for any :math:`\beta_2`.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)} \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(m_t + \lambda p_{t-1}\right) \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    A parameter's first gradient sets :math:`v` to its square and moves nothing. An element whose first gradient is tiny takes
    a huge second step. The authors' later code clips :math:`g_t / \sqrt{v_{t-1}}` against that; this is the paper's first form.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByADOPT(h.betas, h.eps), SkipFirstStep())
