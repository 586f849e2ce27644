"""Prodigy, Mishchenko and Defazio 2023: Adam that estimates its own learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Domain, Optimizer, Slot, State, Transform, ema, hyper, scalar, zeros


@dataclass(frozen=True)
class ScaleByProdigy(Transform):
    r"""Adam's direction, times an estimate :math:`d` of the distance to the solution.

    .. math::
        m_{k+1} &= \beta_1 m_k + (1 - \beta_1) d_k g_k \qquad
        v_{k+1} = \beta_2 v_k + (1 - \beta_2) d_k^2 g_k^2 \\
        r_{k+1} &= \sqrt{\beta_2} r_k + \gamma_k d_k^2 \langle g_k, x_0 - x_k \rangle \qquad
        s_{k+1} = \sqrt{\beta_2} s_k + \gamma_k d_k^2 g_k \\
        d_{k+1} &= \max(d_k, r_{k+1} / \|s_{k+1}\|_1) \qquad
        u_k = d_k (m_{k+1} / (\sqrt{v_{k+1}} + d_k \epsilon) + \lambda x_k)

    with :math:`\gamma_k` the learning rate and its warm-up; the sums are over the whole model. The paper's factor
    :math:`1 - \sqrt{\beta_2}` of r and s cancels in their ratio. Both are divided by :math:`d_0`, as in the authors' code,
    lest squares of a small estimate vanish.

    Slots: ``exp_avg``, ``exp_avg_sq``, ``s`` and ``start``, of the parameter's shape; ``r`` and ``d``, one number each.
    """

    lr: float = hyper(1.0, ge=0)
    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, role=("first_moment", "second_moment"))
    eps: float = hyper(1e-8, ge=0)
    d0: float = hyper(1e-6, gt=0)
    weight_decay: float = hyper(0.0, ge=0, role="weight_decay")
    warmup_steps: float = hyper(0, ge=0)
    name = "prodigy"
    domain = Domain.MODEL

    def slots(self, param: Tensor) -> dict[str, Slot]:
        moments = {"exp_avg": zeros(param, "rotate"), "exp_avg_sq": zeros(param, "permute"), "s": zeros(param)}
        return {**moments, "start": Slot(param.shape, exact=True), "r": scalar(), "d": scalar()}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        start = torch.where(c.step == 1, c.param, s["start"])
        d = s["d"].clamp(min=self.d0)
        scaled = d.to(u.dtype) * u
        m = ema(s["exp_avg"], scaled, self.betas[0])
        v = ema(s["exp_avg_sq"], scaled * scaled, self.betas[1])

        rate = self.lr * (c.step / (self.warmup_steps + 1)).clamp(max=1)
        weight, decay = rate * d * (d / self.d0), self.betas[1] ** 0.5
        distances = s["s"] * decay + weight * u
        r = decay * s["r"] + c.sum(weight * u * (start - c.param))  # a group's own rate weighs its part
        norm = c.sum(distances.abs())
        estimate = torch.where(norm > 0, r / norm, 0.0)

        step = d * (c.divide(m, v.sqrt(), d * self.eps) + self.weight_decay * c.param)
        new = {"exp_avg": m, "exp_avg_sq": v, "s": distances, "start": start, "r": r, "d": torch.maximum(d, estimate)}
        return step, new


class Prodigy(Optimizer):
    r"""Prodigy, Mishchenko and Defazio 2023, Prodigy: An Expeditiously Adaptive Parameter-Free Learner (arXiv:2306.06101),
    Algorithm 4, the variant of Adam.

    The learning rate is a factor of the estimate: leave it at 1, and schedule it towards 0 as usual.

    Args:
        lr: :math:`\gamma`, what the estimated rate is multiplied by.
        betas: the decay rates of both moments; :math:`\sqrt{\beta_2}` is that of the estimate's sums.
        eps: what is added to the root of the second moment, times the estimate.
        d0: the first estimate; far below the true distance.

    State: 16 bytes per parameter, and two numbers. ``state[p]["d"]`` is the estimate, the same for all parameters.
    """

    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    d0: float = 1e-6

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByProdigy(h.lr, h.betas, h.eps, h.d0, h.weight_decay, h.warmup_steps),)
