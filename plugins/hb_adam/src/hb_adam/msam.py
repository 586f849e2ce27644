"""MSAMLaProp: LaProp, with the gradient from a point further along the momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hbcore.api import Context, Domain, Optimizer, Options, ScaleByLaProp, Slot, State, Transform, hyper, zeros

SMALLEST = 1e-12
"""The least norm that the momentum is divided by: one that vanishes perturbs nothing."""


@dataclass(frozen=True)
class MomentumSAM(Transform):
    r"""The step, and the perturbation to train with, Becker, Altrock and Risse 2024 (arXiv:2401.12033), Algorithm 1.

    .. math::
        w_t = w_{t-1} - \gamma_t (u_t + \lambda w_{t-1}) \qquad
        e_t = \rho \frac{u_t}{\lVert u_t \rVert} \qquad
        p_t = w_t - e_t \qquad
        \gamma_t = \mathrm{lr} \min(1, t / (N + 1))

    The norm is that of the updates of all parameters together. Training has :math:`p` for its parameter, evaluation
    :math:`w = p + e`. The state is :math:`e`, not :math:`w`: it is zero before the first step, loses little when it is stored
    with few bits, and holds for a parameter that sits steps out, and while :math:`\rho` changes. It is stored as
    :math:`w - p`, so that :math:`w` does not lose what :math:`p` is rounded by. The paper restores :math:`w` from the momentum
    and its norm, one tensor less; but that norm is the whole model's, which no parameter knows by itself.

    Args:
        lr, warmup_steps: the learning rate and ``N``.
        sam_step_size: :math:`\rho`, at least 0.
        weight_decay: :math:`\lambda`, at least 0. It turns no perturbation.
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
        return {"perturbation": zeros(param)}

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

    with the gradient at :math:`p_{t-1}` and LaProp's moments (arXiv:2002.04839). SAM takes a second gradient to find the
    point where it takes the first; here the momentum leads there. The model trains with :math:`p` and is to be evaluated with
    :math:`w`: call ``optimizer.eval()`` before, ``optimizer.train()`` after.

    The norm is that of the momentum of all parameters that step, as in the paper: :math:`\rho` is the length of the
    perturbation of the whole model. What a clip or caution leaves of the update is what the perturbation follows; weight
    decay does not turn it. ``use_ema`` averages :math:`p`.

    Args:
        params: parameters, named parameters or groups of them; any floating dtype and shape.
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        sam_step_size: :math:`\rho`, at least 0. The paper has 0.3 and more for SGD.
        **options: ``weight_decay`` is :math:`\lambda`; for all of them see :class:`hbcore.api.Options`.

    State: ``exp_avg``, ``exp_avg_sq`` and ``perturbation``, :math:`w - p`, of the parameter's shape, and ``step``.

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
        eps: float = 1e-6,
        sam_step_size: float = 0.1,
        **options: Unpack[Options],
    ) -> None:
        cautious = bool(options.pop("cautious_weight_decay", False))  # the rule's own decay minds it
        hyperparameters = {"lr": lr, "betas": betas, "eps": eps, "sam_step_size": sam_step_size}
        super().__init__(params, {**hyperparameters, "cautious_weight_decay": cautious}, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        step = MomentumSAM(h.lr, h.warmup_steps, h.sam_step_size, h.weight_decay, h.cautious_weight_decay)
        return (ScaleByLaProp(h.betas, h.eps), step)
