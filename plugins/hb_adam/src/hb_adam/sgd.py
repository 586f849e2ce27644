"""Stochastic gradient descent with momentum, in torch.optim.SGD's form."""

from __future__ import annotations

from typing import Any, ClassVar

from hbcore.api import Counterpart, CoupleDecay, Momentum, Optimizer, Transform


class SGD(Optimizer):
    r"""Stochastic gradient descent with momentum, Sutskever et al. 2013, in torch.optim's form.

    .. math::
        b_1 = g_1 \qquad b_t = \mu b_{t-1} + (1 - \tau) g_t \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(u_t + \lambda p_{t-1}\right)

    where :math:`u_t = b_t`, or :math:`g_t + \mu b_t` with Nesterov's momentum. ``decoupled_weight_decay=False`` adds
    :math:`\lambda p` to the gradient instead, which is torch.optim's rule.

    Args:
        lr: learning rate.
        momentum: :math:`\mu`, at least 0; ``beta`` is another spelling.
        dampening: :math:`\tau`.
        nesterov: look ahead along the momentum.
        decoupled_weight_decay: decay the weights rather than regularise the loss.
        beta: another spelling of ``momentum``, which it overrides.
        weight_decay: :math:`\lambda`.

    State: ``momentum_buffer``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    decoupled_weight_decay: bool = True
    beta: float | None = None
    counterpart: ClassVar[Counterpart | None] = Counterpart("SGD", {"decoupled_weight_decay": False})

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        beta = h.pop("beta")
        return h if beta is None else {**h, "momentum": beta}

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        momentum = Momentum(h.momentum, h.dampening, h.nesterov)
        return (momentum,) if h.decoupled_weight_decay else (CoupleDecay(h.weight_decay), momentum)
