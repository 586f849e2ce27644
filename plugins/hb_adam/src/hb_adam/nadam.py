"""NAdam, Dozat 2016."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hbcore.api import CoupleDecay, Optimizer, Options, ScaleByNAdam, Transform


class NAdam(Optimizer):
    r"""Adam with Nesterov's momentum, Dozat 2016, Incorporating Nesterov Momentum into Adam, as torch.optim.NAdam has it.

    .. math::
        \mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t \psi}) \qquad \Pi_t = \textstyle\prod_{i \le t} \mu_i \\
        p_t = p_{t-1} - \frac{\mathrm{lr}}{\max(\sqrt{v_t / (1 - \beta_2^t)}, \epsilon)}
        \left(\frac{(1 - \mu_t)\, g_t}{1 - \Pi_t} + \frac{\mu_{t+1}\, m_t}{1 - \Pi_{t+1}}\right)

    with Adam's moments. The gradient is :math:`g_t + \lambda p_{t-1}`, unless ``decoupled_weight_decay`` is true, and the
    weights themselves decay. :math:`\Pi_t` is computed from the parameter's own step and the present :math:`\beta_1` and
    :math:`\psi`; torch.optim multiplies it up step by step, which differs while a scheduler changes them.

    Args:
        params: parameters, named parameters or groups of them; any floating dtype and shape.
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        momentum_decay: :math:`\psi`, at least 0; how fast the momentum rises from half of :math:`\beta_1` to all of it.
        decoupled_weight_decay: decay the weights rather than regularise the loss.
        **options: ``weight_decay`` is :math:`\lambda`; for all of them see :class:`hbcore.api.Options`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option does not exist, or does not go with coupled decay.
        ParameterError: ``params`` is unusable.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.002,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, hyperparameters, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        nadam = ScaleByNAdam(h.betas, h.eps, h.momentum_decay)
        return (nadam,) if h.decoupled_weight_decay else (CoupleDecay(h.weight_decay), nadam)
