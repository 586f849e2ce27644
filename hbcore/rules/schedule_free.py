"""The rules of schedule-free optimizers, Defazio et al. 2024: a second moment alone, and an average in place of a schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hbcore.rules.numerics import debiased_second_moment
from hbcore.rules.transform import Context, Slot, State, Transform, hyper, zeros


@dataclass(frozen=True)
class ScaleByRms(Transform):
    r"""Adam's direction with no first moment, Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1 with :math:`\beta_1 = 0`.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \qquad u_t = g_t / \sqrt{v_t / (1 - \beta_2^t)}

    State: ``exp_avg_sq``, of the parameter's shape.
    """

    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1, role=(None, "second_moment"))
    eps: float = hyper(1e-6, ge=0)
    name = "rms"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg_sq": zeros(param, "permute")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        v, v_hat = debiased_second_moment(s["exp_avg_sq"], u, self.betas[1], c.step)
        return c.divide(u, v_hat.sqrt(), self.eps), {"exp_avg_sq": v}


@dataclass(frozen=True)
class ScheduleFree(Transform):
    r"""An average of the iterates in place of a schedule, Defazio et al. 2024 (arXiv:2405.15682), Algorithm 1.

    .. math::
        \gamma_k = \mathrm{lr} \min(1, k / (N + 1)) \qquad
        w_k = k^r (\max_{i \le k} \gamma_i)^\rho \qquad c_k = w_k / \textstyle\sum_{i \le k} w_i \\
        z_k = z_{k-1} - \gamma_k u_k \qquad
        x_k = (1 - c_k) x_{k-1} + c_k z_k \qquad
        y_k = (1 - \beta_1) z_k + \beta_1 x_k

    The weights are those of the authors' library, which uses the largest learning rate so far where the paper uses the present
    one. ``k`` counts the group's steps, so that all of its parameters average alike; :math:`c_k = 0` while every rate was 0.

    The parameter holds :math:`y` in training and :math:`x` in evaluation, and the state is :math:`d = z - y`. Without ``x``
    and ``z``,

    .. math::
        y_k = y_{k-1} + c_k d_{k-1} - \gamma_k (1 - \beta_1 (1 - c_k)) u_k \qquad
        d_k = (1 - c_k) (d_{k-1} - \beta_1 \gamma_k u_k) \qquad
        x_k = y_k - (1 / \beta_1 - 1) d_k

    The difference starts at zero for any parameter, as :math:`x_0 = y_0 = z_0`: a parameter that has not stepped yet is not a
    special case here, in :meth:`swap` or in a checkpoint. It is the same in both modes, and loses less than ``z`` when stored
    with few bits.

    Args:
        beta1: :math:`\beta_1`, in (0, 1); at 0, ``x`` could not be computed from ``y`` and ``d``.
        warmup_steps: ``N``.
        r: the weights grow as :math:`k^r`.
        weight_lr_power: :math:`\rho`; 0 weights the steps of a warm-up like all others.

    State: ``z_minus_y``, of the parameter's shape. The group carries ``k``, ``weight_sum`` and ``lr_max``.
    """

    lr: float = hyper(0.0025, ge=0)
    beta1: float = hyper(0.9, gt=0, lt=1, role="first_moment")
    warmup_steps: float = hyper(0, ge=0)
    r: float = hyper(0.0)
    weight_lr_power: float = hyper(2.0, ge=0)
    name = "schedule_free"
    stage = "apply"
    owns_apply = True

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"z_minus_y": zeros(param)}

    def scalars(self) -> dict[str, float]:
        return {"k": 0.0, "weight_sum": 0.0, "lr_max": 0.0}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        k, d = s["k"] + 1, s["z_minus_y"]
        lr = self.lr * (k / (self.warmup_steps + 1)).clamp(max=1)
        lr_max = torch.maximum(lr, s["lr_max"])
        weight = k**self.r * lr_max**self.weight_lr_power
        weight_sum = s["weight_sum"] + weight
        ck = weight / weight_sum.clamp(min=1e-300)  # 0 / 0 becomes 0: nothing has moved yet
        y = c.param + ck * d - lr * (1 - self.beta1 * (1 - ck)) * u
        d = (1 - ck) * (d - self.beta1 * lr * u)
        return y, {"z_minus_y": d, "k": k, "weight_sum": weight_sum, "lr_max": lr_max}

    def swap(self, param: Tensor, s: State, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        y_minus_x = (1 / self.beta1 - 1) * s["z_minus_y"]
        return (param + y_minus_x if training else param - y_minus_x), {}
