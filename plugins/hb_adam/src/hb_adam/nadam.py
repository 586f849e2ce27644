"""NAdam, Dozat 2016."""

from __future__ import annotations

from typing import Any, ClassVar

from hbcore.api import Counterpart, CoupleDecay, Optimizer, ScaleByNAdam, Transform


class NAdam(Optimizer):
    r"""Adam with Nesterov's momentum, Dozat 2016, Incorporating Nesterov Momentum into Adam, in torch.optim.NAdam's form.

    .. math::
        \mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t \psi}) \qquad \Pi_t = \textstyle\prod_{i \le t} \mu_i \\
        p_t = p_{t-1} - \frac{\mathrm{lr}}{\max(\sqrt{v_t / (1 - \beta_2^t)}, \epsilon)}
        \left(\frac{(1 - \mu_t)\, g_t}{1 - \Pi_t} + \frac{\mu_{t+1}\, m_t}{1 - \Pi_{t+1}}\right)

    with Adam's moments. Weight decay adds :math:`\lambda p_{t-1}` to the gradient, or with ``decoupled_weight_decay`` shrinks
    the weights. :math:`\Pi_t` is computed from the parameter's own step and the present :math:`\beta_1` and :math:`\psi`;
    torch.optim accumulates it step by step, which differs while a scheduler changes them.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        momentum_decay: :math:`\psi`, at least 0; how fast the momentum rises from half of :math:`\beta_1` to all of it.
        decoupled_weight_decay: decay the weights rather than regularise the loss.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.002
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False
    counterpart: ClassVar[Counterpart | None] = Counterpart(
        "NAdam",
        {"division_backend": "eps_add", "decoupled_weight_decay": False},
        computed={"mu_product": ScaleByNAdam.mu_product},
    )

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        nadam = ScaleByNAdam(h.betas, h.eps, h.momentum_decay)
        return (nadam,) if h.decoupled_weight_decay else (CoupleDecay(h.weight_decay), nadam)
