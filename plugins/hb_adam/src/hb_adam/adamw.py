"""AdamW, Loshchilov and Hutter 2019."""

from __future__ import annotations

from typing import Any, ClassVar

from hb_adam.adam import direction
from hbcore.api import Counterpart, Optimizer, Transform


class AdamW(Optimizer):
    r"""Adam with decoupled weight decay, Loshchilov and Hutter 2019 (arXiv:1711.05101), Algorithm 2.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t = p_{t-1} - \mathrm{lr} \left(\frac{\hat m_t}{\max(\sqrt{\hat v_t}, \epsilon)} + \lambda p_{t-1}\right)

    with the bias-corrected moments :math:`\hat m_t = m_t / (1 - \beta_1^t)`, :math:`\hat v_t = v_t / (1 - \beta_2^t)`. Pass
    ``division_backend="eps_add"`` for torch.optim's :math:`\sqrt{\hat v_t} + \epsilon`.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        amsgrad: divide by the largest second moment so far, Reddi et al. 2018 (arXiv:1904.09237).
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``; ``max_exp_avg_sq`` with ``amsgrad``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    amsgrad: bool = False
    counterpart: ClassVar[Counterpart | None] = Counterpart(
        "AdamW", {"division_backend": "eps_add", "decoupled_weight_decay": True}
    )

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (direction(h),)
