"""Adam, Kingma and Ba 2015, and AMSGrad, Reddi et al. 2018."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbcore.api import (
    Context,
    Counterpart,
    CoupleDecay,
    Optimizer,
    ScaleByAdam,
    Slot,
    State,
    Transform,
    debiased,
    second_moment,
    zeros,
)


@dataclass(frozen=True)
class ScaleByAMSGrad(ScaleByAdam):
    r"""Adam's direction over the largest second moment so far, Reddi et al. 2018 (arXiv:1904.09237), Algorithm 2.

    .. math::
        \bar v_t = \max(\bar v_{t-1}, v_t) \qquad
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{\bar v_t / (1 - \beta_2^t)}}

    with Adam's moments. The paper corrects no bias; torch.optim corrects it after the maximum, as here.

    State: ``max_exp_avg_sq`` beside Adam's, of the parameter's shape.
    """

    name = "amsgrad"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        # Its own slot comes first: a checkpoint without it then counts as Adam's, whose moments are kept, not as a broken one.
        return {"max_exp_avg_sq": zeros(param, "permute"), **super().slots(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        m, m_hat = debiased(s["exp_avg"], u, b1, c.step)
        v = second_moment(s["exp_avg_sq"], u, b2)
        largest = torch.maximum(s["max_exp_avg_sq"], v)
        v_hat = largest * (1 / (1 - b2**c.step))
        return c.divide(m_hat, v_hat.sqrt(), self.eps), {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": largest}


def direction(h: Any) -> ScaleByAdam:
    """Adam's rule for a group's ``betas`` and ``eps``, or AMSGrad's with ``amsgrad``."""
    return (ScaleByAMSGrad if h.amsgrad else ScaleByAdam)(h.betas, h.eps)


class Adam(Optimizer):
    r"""Adam, Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1; its weight decay regularises the loss, as in torch.optim.

    .. math::
        g_t \leftarrow g_t + \lambda p_{t-1} \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t = p_{t-1} - \mathrm{lr} \frac{m_t / (1 - \beta_1^t)}{\max(\sqrt{v_t / (1 - \beta_2^t)}, \epsilon)}

    :class:`hb_adam.AdamW` decays the weights instead. Pass ``division_backend="eps_add"`` for torch.optim's divisor.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        amsgrad: divide by the largest second moment so far.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``; ``max_exp_avg_sq`` with ``amsgrad``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    amsgrad: bool = False
    counterpart: ClassVar[Counterpart | None] = Counterpart(
        "Adam", {"division_backend": "eps_add", "decoupled_weight_decay": False}
    )

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (CoupleDecay(h.weight_decay), direction(h))
