"""Building blocks that several families share. Each reads beside its paper's pseudo-code."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hbcore.rules.numerics import debiased
from hbcore.rules.transform import Context, Slot, State, Transform, hyper, zeros


@dataclass(frozen=True)
class ScaleByAdam(Transform):
    r"""Adam's direction, Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)}} \quad\text{divided as the division backend says}
    """

    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1)
    eps: float = hyper(1e-8, ge=0)
    name = "adam"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate"), "exp_avg_sq": zeros(param, "permute")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        m, m_hat = debiased(s["exp_avg"], u, b1, c.step)
        v, v_hat = debiased(s["exp_avg_sq"], u * u, b2, c.step)
        return c.divide(m_hat, v_hat.sqrt(), self.eps), {"exp_avg": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class Momentum(Transform):
    r"""Polyak's or Nesterov's momentum as torch.optim.SGD has it, Sutskever et al. 2013.

    .. math::
        b_1 = g_1 \qquad b_t = \mu b_{t-1} + (1 - \tau) g_t \qquad
        u_t = b_t \;\text{ or, with Nesterov, }\; g_t + \mu b_t
    """

    momentum: float = hyper(0.9, ge=0)
    dampening: float = hyper(0.0)
    nesterov: bool = False
    name = "momentum"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"momentum_buffer": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        fresh = 1 - self.dampening * (c.step - 1).clamp(max=1)  # 1 on the first step
        buffer = self.momentum * s["momentum_buffer"] + fresh * u
        return (u + self.momentum * buffer if self.nesterov else buffer), {"momentum_buffer": buffer}
