"""Stochastic gradient descent with momentum, as torch.optim.SGD has it."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hbcore.api import CoupleDecay, Momentum, Optimizer, Options, Transform


class SGD(Optimizer):
    r"""Stochastic gradient descent with momentum, Sutskever et al. 2013, in torch.optim's form.

    .. math::
        b_1 = g_1 \qquad b_t = \mu b_{t-1} + (1 - \tau) g_t \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(u_t + \lambda p_{t-1}\right)

    where :math:`u_t = b_t`, or :math:`g_t + \mu b_t` with Nesterov's momentum. ``decoupled_weight_decay=False`` adds
    :math:`\lambda p` to the gradient instead, which is torch.optim's rule.

    Args:
        params: parameters, named parameters or groups of them; any floating dtype and shape.
        lr: learning rate.
        momentum: :math:`\mu`, at least 0; ``beta`` is another spelling.
        dampening: :math:`\tau`.
        nesterov: look ahead along the momentum.
        decoupled_weight_decay: decay the weights rather than regularise the loss.
        beta: another spelling of ``momentum``; wins if both are given.
        **options: ``weight_decay`` is :math:`\lambda`; for all of them see :class:`hbcore.api.Options`.

    State: ``momentum_buffer``, of the parameter's shape, and ``step``.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option does not exist.
        ParameterError: ``params`` is unusable.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0025,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        decoupled_weight_decay: bool = True,
        beta: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "momentum": momentum if beta is None else beta,
            "dampening": dampening,
            "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, hyperparameters, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        momentum = Momentum(h.momentum, h.dampening, h.nesterov)
        return (momentum,) if h.decoupled_weight_decay else (CoupleDecay(h.weight_decay), momentum)
