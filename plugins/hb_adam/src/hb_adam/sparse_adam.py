"""Adam for sparse gradients, in torch.optim.SparseAdam's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hbcore.api import (
    Context,
    Counterpart,
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
class ScaleBySparseAdam(Transform):
    r"""Adam's direction, divided before the bias correction: the form at the end of Kingma and Ba 2015, section 2.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t}} \quad\text{with the division backend's division}

    It is :class:`hbcore.api.ScaleByAdam` with an :math:`\epsilon` that begins smaller than it is by a factor of
    :math:`\sqrt{1 - \beta_2^t}`.

    Slots: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape.
    """

    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, role=("first_moment", "second_moment"))
    eps: float = hyper(1e-8, gt=0)
    name = "sparse_adam"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate"), "exp_avg_sq": zeros(param, "permute")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        m, v = ema(s["exp_avg"], u, b1), second_moment(s["exp_avg_sq"], u, b2)
        correction = (1 - b2**c.step).sqrt() / (1 - b1**c.step)
        return c.divide(m, v.sqrt(), self.eps) * correction, {"exp_avg": m, "exp_avg_sq": v}


class SparseAdam(Optimizer):
    r"""Adam for sparse gradients on dense weights, equal to torch.optim.SparseAdam.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t = p_{t-1} - \mathrm{lr}
        \left(\frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t} + \epsilon} + \lambda p_{t-1}\right)

    only in the rows that have a gradient in step ``t``; in the others neither weights nor moments change, and nothing of
    them is read. If every row has one, that is Adam (Kingma and Ba 2015, arXiv:1412.6980). ``t`` counts the steps of the whole
    parameter. The gradients of a row that occurs more than once are summed.

    ``nn.Embedding(..., sparse=True)`` and ``nn.EmbeddingBag`` make such gradients, of the layout ``torch.sparse_coo``; ``step``
    refuses others. Dense layers need another optimizer: :class:`hbcore.SplitOpt` joins the two. Options that compute over a
    whole tensor, as ``caution`` does, compute over the rows that have a gradient. ``capturable`` and ``use_ema`` need whole
    gradients and are not supported.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the divisor, above 0: the ``division_backend`` of this class is ``"eps_add"`` by default.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    division_backend = "eps_add"
    sparse_gradients: ClassVar[bool] = True
    counterpart: ClassVar[Counterpart | None] = Counterpart("SparseAdam", {"division_backend": "eps_add"}, whole_steps=True)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleBySparseAdam(h.betas, h.eps),)
