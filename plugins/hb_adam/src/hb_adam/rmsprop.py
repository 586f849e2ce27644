"""RMSprop, Tieleman and Hinton 2012."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hbcore.api import (
    Context,
    Counterpart,
    CoupleDecay,
    Momentum,
    Optimizer,
    OptionError,
    Slot,
    State,
    Transform,
    ema,
    hyper,
    second_moment,
    zeros,
)


@dataclass(frozen=True)
class ScaleByRMSprop(Transform):
    r"""The gradient over its root mean square, Tieleman and Hinton 2012, Neural Networks for Machine Learning, lecture 6.5.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2 \qquad u_t = g_t / \sqrt{v_t / (1 - \alpha^t)}

    ``centered`` replaces the mean square by the variance, Graves 2013 (arXiv:1308.0850), equations 38 to 40:

    .. math::
        n_t = \alpha n_{t-1} + (1 - \alpha) g_t \qquad u_t = g_t / \sqrt{(v_t - n_t^2) / (1 - \alpha^t)}

    Without ``debias`` the factor :math:`1 - \alpha^t` is left out. The variance is divided by it as a whole: with the moments
    corrected separately, it would be 0 on the first step.

    State: ``square_avg``, and ``grad_avg`` if centered, of the parameter's shape.
    """

    alpha: float = hyper(0.99, ge=0, lt=1, role="second_moment")
    eps: float = hyper(1e-6, ge=0)
    centered: bool = False
    debias: bool = True
    name = "rmsprop"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        centre = {"grad_avg": zeros(param, "rotate")} if self.centered else {}
        return {"square_avg": zeros(param, "permute"), **centre}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        new = {"square_avg": second_moment(s["square_avg"], u, self.alpha)}
        spread = new["square_avg"]
        if self.centered:
            new["grad_avg"] = ema(s["grad_avg"], u, self.alpha)
            spread = (spread - new["grad_avg"] * new["grad_avg"]).clamp(min=0)  # negative only by rounding
        if self.debias:
            spread = spread * (1 / (1 - self.alpha**c.step))
        return c.divide(u, spread.sqrt(), self.eps), new


class RMSprop(Optimizer):
    r"""RMSprop, Tieleman and Hinton 2012, with every argument of torch.optim.RMSprop; bias-corrected unless told otherwise.

    .. math::
        v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2 \qquad
        u_t = \frac{g_t}{\max(\sqrt{v_t / (1 - \alpha^t)}, \epsilon)} \qquad
        b_t = \mu b_{t-1} + u_t \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(b_t + \lambda p_{t-1}\right)

    ``debias=False, decoupled_weight_decay=False, division_backend="eps_add"`` is torch.optim's rule.

    Args:
        lr: learning rate.
        alpha: decay rate of the squared gradient, in [0, 1).
        eps: the smallest divisor, at least 0.
        momentum: :math:`\mu`, at least 0; ``mars`` corrects by it and needs one above 0.
        centered: subtract the square of the mean gradient, Graves 2013 (arXiv:1308.0850).
        debias: divide :math:`v_t` by :math:`1 - \alpha^t`.
        decoupled_weight_decay: decay the weights rather than regularise the loss.
        betas: HeavyBall's spelling; its second number replaces ``alpha``, the first is ignored.
        weight_decay: :math:`\lambda`.

    State: ``square_avg`` and ``momentum_buffer``, ``grad_avg`` if centered, of the parameter's shape, and ``step``. The buffer
    exists at a momentum of 0 too, so that a scheduler may raise it.
    """

    lr: float = 0.0025
    alpha: float = 0.99
    eps: float = 1e-6
    momentum: float = 0.0
    centered: bool = False
    debias: bool = True
    decoupled_weight_decay: bool = True
    betas: tuple[float, float] | None = None
    counterpart: ClassVar[Counterpart | None] = Counterpart(
        "RMSprop",
        {"division_backend": "eps_add", "decoupled_weight_decay": False, "debias": False},
    )

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        betas = h.pop("betas")
        return h if betas is None else {**h, "alpha": betas[1]}

    def after_init(self) -> None:
        if self.settings.mars and not self.defaults["momentum"]:
            raise OptionError("RMSprop: mars corrects by the momentum, which is 0; pass a momentum, or mars=False.")

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        rule = (ScaleByRMSprop(h.alpha, h.eps, h.centered, h.debias), Momentum(h.momentum))
        return rule if h.decoupled_weight_decay else (CoupleDecay(h.weight_decay), *rule)
