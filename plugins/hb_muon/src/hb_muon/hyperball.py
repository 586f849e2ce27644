"""HyperBallAdamW: matrices stay on the sphere that they start on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Domain, Optimizer, Route, ScaleByAdam, State, Transform, hyper, is_matrix

SMALLEST = 1e-12
"""Lower bound of the norm that an update is divided by, so that an update of zeros moves nothing."""


@dataclass(frozen=True)
class HyperBall(Transform):
    r"""A step of a given length relative to the parameter's norm, which it keeps: HyperBall, Wen et al. 2025.

    .. math::
        R = \lVert p_{t-1} \rVert \qquad
        q = p_{t-1} - \gamma_t R \frac{u}{\lVert u \rVert} \qquad p_t = R \frac{q}{\lVert q \rVert} \qquad
        \gamma_t = \mathrm{lr} \min(1, t / (N + 1))

    The radius is that of the initial weights in the paper. Here it is computed from the present weights, whose norm the step
    keeps: nothing is stored, and weights that are loaded or averaged keep their own norm. The norms and the last product are
    computed in float64, so that the only error is the rounding of the stored weights, which is independent of their sign
    and size: a random walk of about :math:`2^{-24} \sqrt{t / n}` of the radius in ``t`` steps for ``n`` float32 elements
    (2e-8 after 1000 steps for 1200), and :math:`2^{-9} \sqrt{t / n}` for bfloat16.
    """

    lr: float = hyper(0.0025, ge=0)
    warmup_steps: float = hyper(0, ge=0)
    name = "hyperball"
    stage = "apply"
    domain = Domain.TENSOR
    owns_apply = True

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        rate = self.lr * (c.step / (self.warmup_steps + 1)).clamp(max=1)
        # A norm or a quotient rounded to float32 is off by the same factor for every element: a drift, not noise.
        param, direction = c.param.double(), u.double()
        radius = c.norm(param)
        moved = param - direction / c.norm(direction).clamp(min=SMALLEST) * (rate * radius)
        return (moved * (radius / c.norm(moved).clamp(min=torch.finfo(torch.float64).tiny))).to(u.dtype), {}


class HyperBallAdamW(Optimizer):
    r"""Adam's direction for matrices on a sphere: Wen et al. 2025, Fantastic Pretraining Optimizers and Where to Find Them 2.1.

    .. math::
        u_t = \frac{\hat m_t}{\max(\sqrt{\hat v_t}, \epsilon)} + \lambda p_{t-1} \qquad
        p_t = R \operatorname{unit}\left(p_{t-1} - \mathrm{lr}\, R \operatorname{unit}(u_t)\right) \qquad
        R = \lVert p_0 \rVert

    with Adam's corrected moments, and :math:`\operatorname{unit}(x) = x / \lVert x \rVert` of the whole tensor, for each
    parameter with two dimensions or more that are larger than 1; all others take AdamW's step. A matrix keeps its norm:
    ``lr`` is about the angle of a step in radians, and weight decay only turns it. A matrix of zeros stays zero: give weights
    that start at zero, such as one factor of a LoRA, to another optimizer.

    Args:
        lr: learning rate: relative to the norm for matrices, AdamW's for all others.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByAdam(h.betas, h.eps), Route(is_matrix, (HyperBall(h.lr, h.warmup_steps),)))
