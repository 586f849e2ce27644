"""MSAMLaProp: LaProp, with the gradient from a point further along the momentum."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Domain, Optimizer, ScaleByLaProp, Slot, State, Transform, hyper

SMALLEST = 1e-12
"""Lower bound of the norm that the momentum is divided by, so that a momentum of zeros perturbs nothing."""


@dataclass(frozen=True)
class MomentumSAM(Transform):
    r"""The step, and the perturbation that training adds, Becker, Altrock and Risse 2024 (arXiv:2401.12033), Algorithm 1.

    .. math::
        w_t = w_{t-1} - \gamma_t (u_t + \lambda w_{t-1}) \qquad
        e_t = \rho \frac{u_t}{\lVert u_t \rVert} \qquad
        p_t = w_t - e_t \qquad
        \gamma_t = \mathrm{lr} \min(1, t / (N + 1))

    The norm is taken over the updates of all parameters together. The parameter holds :math:`p` in training and
    :math:`w = p + e` in evaluation. The state is :math:`e`, not :math:`w`: it is zero before the first step, and stays valid
    for a parameter that skips steps and while :math:`\rho` changes. It is computed as :math:`w - p`, so that rounding
    :math:`p` costs :math:`w` nothing; rounding :math:`e` would move :math:`w` in every step, so no codec stores it. The paper
    restores :math:`w` from the momentum and its norm and saves one tensor; but that norm is the whole model's, which a single
    parameter does not have.

    Args:
        lr, warmup_steps: the learning rate and ``N``.
        sam_step_size: :math:`\rho`, at least 0.
        weight_decay: :math:`\lambda`, at least 0. The perturbation ignores it.
        cautious: decay only where update and weight agree in sign.

    Slots: ``perturbation``, :math:`e`, of the parameter's shape.
    """

    lr: float = hyper(0.0025, ge=0)
    warmup_steps: float = hyper(0, ge=0)
    sam_step_size: float = hyper(0.1, ge=0)
    weight_decay: float = hyper(0.0, ge=0, role="weight_decay")
    cautious: bool = False
    name = "msam"
    stage = "apply"
    domain = Domain.MODEL
    owns_apply = True

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"perturbation": Slot(param.shape, exact=True)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        rate = self.lr * (c.step / (self.warmup_steps + 1)).clamp(max=1)
        w = c.param + s["perturbation"]
        decay = self.weight_decay * w
        step = u + (torch.where(u * w > 0, decay, 0.0) if self.cautious else decay)
        w = w - rate * step
        p = w - u * (self.sam_step_size / c.norm(u).clamp(min=SMALLEST))
        return p, {"perturbation": w - p}

    def swap(self, param: Tensor, s: State, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return (param - s["perturbation"] if training else param + s["perturbation"]), {}


class MSAMLaProp(Optimizer):
    r"""LaProp with Momentum-SAM, Becker, Altrock and Risse 2024 (arXiv:2401.12033), Algorithm 1: flat minima at no cost.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\max(\sqrt{v_t / (1 - \beta_2^t)}, \epsilon)} \qquad
        w_t = w_{t-1} - \mathrm{lr} \left(\frac{m_t}{1 - \beta_1^t} + \lambda w_{t-1}\right) \qquad
        p_t = w_t - \rho \frac{m_t}{\lVert m_t \rVert}

    with the gradient at :math:`p_{t-1}` and LaProp's moments (arXiv:2002.04839). SAM needs an extra gradient to find the
    perturbed point; here the momentum points there. The model trains with :math:`p` and must be evaluated with :math:`w`: call
    ``optimizer.eval()`` before evaluation, ``optimizer.train()`` after it.

    The norm is that of the momentum of all parameters that step, as in the paper: :math:`\rho` is the length of the
    perturbation of the whole model. The perturbation follows the update after clipping and caution, and ignores weight decay.
    ``use_ema`` averages :math:`p`.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        sam_step_size: :math:`\rho`, at least 0. The paper uses 0.3 and more for SGD.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg``, ``exp_avg_sq`` and ``perturbation``, :math:`w - p`, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-6
    sam_step_size: float = 0.1
    _: KW_ONLY
    cautious_weight_decay: bool = False  # applied by the rule's own decay

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        step = MomentumSAM(h.lr, h.warmup_steps, h.sam_step_size, h.weight_decay, h.cautious_weight_decay)
        return (ScaleByLaProp(h.betas, h.eps), step)
