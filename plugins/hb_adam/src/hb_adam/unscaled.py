"""AdamW whose update keeps the size of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hbcore.api import Context, Optimizer, Options, ScaleByAdam, State, Transform, debiased


@dataclass(frozen=True)
class ScaleByUnscaledAdam(ScaleByAdam):
    r"""A momentum that weighs each gradient by the inverse of its scale then, and the whole by the scale of now.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \qquad r_t = \sqrt{v_t / (1 - \beta_2^t)} \\
        m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t / r_t \qquad
        u_t = r_t\, m_t / (1 - \beta_1^t)
    """

    name = "unscaled_adam"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        v, v_hat = debiased(s["exp_avg_sq"], u * u, b2, c.step)
        scale = v_hat.sqrt()
        m, m_hat = debiased(s["exp_avg"], c.divide(u, scale, self.eps), b1, c.step)
        return m_hat * scale, {"exp_avg": m, "exp_avg_sq": v}


class UnscaledAdamW(Optimizer):
    r"""AdamW whose update keeps the size of the gradient; the rule is HeavyBall's.

    .. math::
        r_t = \sqrt{v_t / (1 - \beta_2^t)} \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\max(r_t, \epsilon)} \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(\frac{r_t\, m_t}{1 - \beta_1^t} + \lambda p_{t-1}\right)

    with Adam's second moment :math:`v_t`. Both moments are corrected for their bias. A step is as long as one along an average
    of the gradients, so that lr is to be chosen as for SGD: ten times as large as for one whose momentum of 0.9 sums. A
    gradient much larger than its predecessors weighs no more in the momentum than they do.

    Args:
        params: parameters, named parameters or groups of them; any floating dtype and shape.
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        **options: ``weight_decay`` is :math:`\lambda`; for all of them see :class:`hbcore.api.Options`.

    State: ``exp_avg``, which averages :math:`g_t / r_t`, and ``exp_avg_sq``, of the parameter's shape, and ``step``.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option does not exist.
        ParameterError: ``params`` is unusable.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByUnscaledAdam(h.betas, h.eps),)
