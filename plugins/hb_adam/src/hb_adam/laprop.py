"""LaProp, Ziyin, Wang and Ueda 2020, and its signed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Domain, Optimizer, ScaleByLaProp, State, Transform


class LaProp(Optimizer):
    r"""Momentum of normalised gradients, Ziyin, Wang and Ueda 2020 (arXiv:2002.04839), Algorithm 1.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\max(\sqrt{v_t / (1 - \beta_2^t)}, \epsilon)} \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(\frac{m_t}{1 - \beta_1^t} + \lambda p_{t-1}\right)

    with Adam's second moment :math:`v_t`. Adam divides the average; LaProp divides each gradient before averaging, so
    that any :math:`\beta_1` is stable with any :math:`\beta_2`.

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
        return (ScaleByLaProp(h.betas, h.eps),)


@dataclass(frozen=True)
class SignWithNorm(Transform):
    r"""The signs of the update at its norm, :math:`\mathrm{sgn}(u)\, \lVert u \rVert / \lVert \mathrm{sgn}(u) \rVert`."""

    name = "sign_with_norm"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        signs = torch.sign(u)
        return signs * (c.norm(u) / c.norm(signs).clamp(min=1)), {}  # a norm below 1 is 0, of an update of zeros


class SignLaProp(LaProp):
    r"""The signs of LaProp's update, scaled to its norm in each tensor; HeavyBall's rule.

    .. math::
        u_t = \frac{m_t}{1 - \beta_1^t} \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(\frac{\lVert u_t \rVert_2}{\lVert \mathrm{sgn}(u_t) \rVert_2}\,\mathrm{sgn}(u_t)
        + \lambda p_{t-1}\right)

    with LaProp's average :math:`m_t` (arXiv:2002.04839).

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByLaProp(h.betas, h.eps), SignWithNorm())
