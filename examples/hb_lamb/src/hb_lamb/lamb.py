"""LAMB, You et al. 2019: Adam's step, as long as the parameter it is taken from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Domain, Optimizer, ScaleByAdam, State, Transform, hyper


@dataclass(frozen=True)
class ScaleByTrust(Transform):
    r"""Decay the weights, and scale the update to the norm of its parameter.

    .. math::
        r_t = u_t + \lambda x_t \qquad u_t \leftarrow \frac{\|x_t\|}{\|r_t\|} r_t

    and :math:`u_t \leftarrow r_t` where either norm is zero, as for a bias that starts at zero. The norms are those of one
    parameter.
    """

    weight_decay: float = hyper(0.0, ge=0, role="weight_decay")
    name = "trust"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        r = u + self.weight_decay * c.param
        weight, length = c.norm(c.param), c.norm(r)
        ratio = torch.where((weight > 0) & (length > 0), weight / length, 1.0)
        return ratio * r, {}


class LAMB(Optimizer):
    r"""LAMB, You et al. 2019, Large Batch Optimization for Deep Learning: Training BERT in 76 minutes (arXiv:1904.00962),
    Algorithm 2, with both moments corrected for their start at zero.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        r_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda x_t \qquad
        x_{t+1} = x_t - \mathrm{lr} \frac{\phi(\|x_t\|)}{\|r_t\|} r_t

    with :math:`\phi(z) = z`, without bounds, and a ratio of 1 where it would be 0 or infinite. Every parameter tensor is a
    layer of the paper's. ``division_backend="eps_add"`` adds :math:`\epsilon` as above; by default it is the least divisor.

    Args:
        lr: the learning rate, relative to a parameter's norm.
        betas: the decay rates of both moments, in [0, 1).
        eps: :math:`\epsilon`.

    State: 8 bytes per parameter in float32.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByAdam(h.betas, h.eps), ScaleByTrust(h.weight_decay))
