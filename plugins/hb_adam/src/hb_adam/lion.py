"""Lion, Chen et al. 2023."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Optimizer, Slot, State, Transform, ema, hyper, zeros


@dataclass(frozen=True)
class ScaleByLion(Transform):
    r"""Lion's direction, Chen et al. 2023, Symbolic Discovery of Optimization Algorithms (arXiv:2302.06675), Algorithm 2.

    .. math::
        u_t = \mathrm{sgn}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) \qquad m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t
    """

    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1, role=("first_moment", None))
    name = "lion"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        return torch.sign(ema(s["exp_avg"], u, b1)), {"exp_avg": ema(s["exp_avg"], u, b2)}


class Lion(Optimizer):
    r"""The sign of a momentum, Chen et al. 2023 (arXiv:2302.06675), Algorithm 2.

    .. math::
        p_t = p_{t-1} - \mathrm{lr} \left(\mathrm{sgn}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) + \lambda p_{t-1}\right) \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t

    Every element moves by the learning rate: the paper uses a third to a tenth of AdamW's, and three to ten times its decay.

    Args:
        lr: learning rate.
        betas: the momentum's weight inside the sign, and its decay rate, in [0, 1).
        weight_decay: :math:`\lambda`.

    State: ``exp_avg``, of the parameter's shape, and ``step``.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByLion(h.betas),)
