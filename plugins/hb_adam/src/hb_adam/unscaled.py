"""AdamW whose update keeps the size of the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import (
    Context,
    Optimizer,
    ScaleByAdam,
    State,
    Transform,
    debiased,
    debiased_second_moment,
)


@dataclass(frozen=True)
class ScaleByUnscaledAdam(ScaleByAdam):
    r"""A momentum of gradients, each divided by the scale at its step, times the present scale.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \qquad r_t = \sqrt{v_t / (1 - \beta_2^t)} \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t / r_t \qquad
        u_t = r_t\, m_t / (1 - \beta_1^t)
    """

    name = "unscaled_adam"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        v, v_hat = debiased_second_moment(s["exp_avg_sq"], u, b2, c.step)
        scale = v_hat.sqrt()
        m, m_hat = debiased(s["exp_avg"], c.divide(u, scale, self.eps), b1, c.step)
        return torch.where(scale == math.inf, 0.0, m_hat * scale), {"exp_avg": m, "exp_avg_sq": v}


class UnscaledAdamW(Optimizer):
    r"""AdamW whose update keeps the size of the gradient; the rule is HeavyBall's.

    .. math::
        r_t = \sqrt{v_t / (1 - \beta_2^t)} \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\max(r_t, \epsilon)} \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(\frac{r_t\, m_t}{1 - \beta_1^t} + \lambda p_{t-1}\right)

    with Adam's second moment :math:`v_t`. Both moments are bias-corrected. A step is as long as one along an average of the
    gradients, so choose ``lr`` as for SGD: ten times as large as for an SGD whose momentum of 0.9 sums them. A gradient much
    larger than its predecessors has no more weight in the momentum than they have.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg``, which averages :math:`g_t / r_t`, and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByUnscaledAdam(h.betas, h.eps),)
