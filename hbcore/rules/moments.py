"""Building blocks shared by several families. Each follows its paper's pseudo-code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.rules.numerics import Scalar, debiased, debiased_second_moment, ema
from hbcore.rules.stages import DecayWeights
from hbcore.rules.transform import Context, Role, Slot, State, Transform, hyper, zeros

MOMENTS: tuple[Role, Role] = ("first_moment", "second_moment")
"""The roles of ``betas``."""


@dataclass(frozen=True)
class ScaleByAdam(Transform):
    r"""Adam's direction, Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)}} \quad\text{divided by the division backend}
    """

    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1, role=MOMENTS)
    eps: float = hyper(1e-8, ge=0)
    name = "adam"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate"), "exp_avg_sq": zeros(param, "permute")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        m, m_hat = debiased(s["exp_avg"], u, b1, c.step)
        v, v_hat = debiased_second_moment(s["exp_avg_sq"], u, b2, c.step)
        return c.divide(m_hat, v_hat.sqrt(), self.eps), {"exp_avg": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class Average(Transform):
    r"""A running average, :math:`m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t`, which is not corrected for its start at zero."""

    beta: float = hyper(0.9, ge=0, lt=1, role="first_moment")
    name = "average"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        m = ema(s["exp_avg"], u, self.beta)
        return m, {"exp_avg": m}


@dataclass(frozen=True)
class Momentum(Transform):
    r"""Polyak or Nesterov momentum as in torch.optim.SGD, Sutskever et al. 2013.

    .. math::
        b_1 = g_1 \qquad b_t = \mu b_{t-1} + (1 - \tau) g_t \qquad
        u_t = b_t \;\text{ or, with Nesterov, }\; g_t + \mu b_t
    """

    momentum: float = hyper(0.9, ge=0, role="first_moment")
    dampening: float = hyper(0.0)
    nesterov: bool = False
    name = "momentum"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"momentum_buffer": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        fresh = 1 - self.dampening * (c.step - 1).clamp(max=1)  # 1 on the first step
        buffer = self.momentum * s["momentum_buffer"] + fresh * u
        return (u + self.momentum * buffer if self.nesterov else buffer), {"momentum_buffer": buffer}


@dataclass(frozen=True)
class ScaleByLaProp(Transform):
    r"""LaProp's direction, Ziyin, Wang and Ueda 2020 (arXiv:2002.04839), Algorithm 1: normalise, then average.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)}} \qquad
        u_t = \frac{m_t}{1 - \beta_1^t}
    """

    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1, role=MOMENTS)
    eps: float = hyper(1e-8, ge=0)
    name = "laprop"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate"), "exp_avg_sq": zeros(param, "permute")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        v, v_hat = debiased_second_moment(s["exp_avg_sq"], u, b2, c.step)
        m, m_hat = debiased(s["exp_avg"], c.divide(u, v_hat.sqrt(), self.eps), b1, c.step)
        return m_hat, {"exp_avg": m, "exp_avg_sq": v}


@dataclass(frozen=True)
class ScaleByNAdam(Transform):
    r"""NAdam's direction, Dozat 2016, Incorporating Nesterov Momentum into Adam, Algorithm 2, with its momentum schedule.

    .. math::
        \mu_t = \beta_1 (1 - \tfrac12\, 0.96^{t \psi}) \qquad \Pi_t = \textstyle\prod_{i \le t} \mu_i \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t = \left(\frac{(1 - \mu_t)\, g_t}{1 - \Pi_t} + \frac{\mu_{t+1}\, m_t}{1 - \Pi_{t+1}}\right)
        \Big/ \sqrt{v_t / (1 - \beta_2^t)}

    The product is computed from the parameter's step by :func:`momentum_product`, so it needs no state.

    Args:
        momentum_decay: :math:`\psi`, at least 0; how fast the momentum rises from :math:`\beta_1 / 2` to :math:`\beta_1`.
    """

    betas: tuple[float, float] = hyper((0.9, 0.999), ge=0, lt=1, role=MOMENTS)
    eps: float = hyper(1e-8, ge=0)
    momentum_decay: float = hyper(4e-3, ge=0)
    name = "nadam"

    @staticmethod
    def mu_product(group: Mapping[str, Any], step: float) -> float:
        r""":math:`\Pi_t` of a param group, which torch.optim.NAdam keeps in its state."""
        t = torch.tensor(step, dtype=torch.float64, device="cpu")
        return float(momentum_product(float(group["betas"][0]), float(group["momentum_decay"]), t))

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate"), "exp_avg_sq": zeros(param, "permute")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b1, b2 = self.betas
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (t * self.momentum_decay)) for t in (c.step, c.step + 1))
        product = momentum_product(b1, self.momentum_decay, c.step)
        m = ema(s["exp_avg"], u, b1)
        v, v_hat = debiased_second_moment(s["exp_avg_sq"], u, b2, c.step)
        ahead = u * ((1 - mu) / (1 - product)) + m * (mu_next / (1 - product * mu_next))
        return c.divide(ahead, v_hat.sqrt(), self.eps), {"exp_avg": m, "exp_avg_sq": v}


def momentum_product(beta1: Scalar, decay: Scalar, step: Tensor) -> Tensor:
    r"""NAdam's product of momenta, :math:`\prod_{i=1}^t \beta_1 (1 - \tfrac12 q^i)` with :math:`q = 0.96^\psi`.

    The series of the logarithm sums over ``i`` in closed form; its terms shrink by half each time:

    .. math::
        \log \prod_{i=1}^t (1 - \tfrac12 q^i) = -\sum_{k \ge 1} \frac{2^{-k}}{k} \sum_{i=1}^t q^{ik} =
        -\sum_{k \ge 1} \frac{2^{-k}}{k}\, \frac{1 - q^{kt}}{q^{-k} - 1}

    Forty terms leave an error of 1e-14.

    Args:
        beta1, decay: :math:`\beta_1` and :math:`\psi`, 0-d float64.
        step: ``t``, 0-d float64, at least 1.
    """
    rate = torch.as_tensor(decay, dtype=torch.float64) * -math.log(0.96)
    rate = rate.clamp(min=1e-300)  # at q = 1 the quotient is t
    past, total = rate * step, 0 * step
    for k in range(1, 41):
        total = torch.addcdiv(total, torch.expm1(past * -k), torch.expm1(rate * k), value=0.5**k / k)  # without cancellation
    return beta1**step * torch.exp(total)


@dataclass(frozen=True)
class ScaleByAdEMAMix(Transform):
    r"""AdEMAMix's direction, Pagliardini, Ablin and Grangier 2024 (arXiv:2409.03137), Algorithm 1: a second, slow momentum.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad
        n_t = \beta_3(t)\, n_{t-1} + (1 - \beta_3(t))\, g_t \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t = \frac{m_t / (1 - \beta_1^t) + \alpha(t)\, n_t}{\sqrt{v_t / (1 - \beta_2^t)}} \qquad
        \alpha(t) = \alpha \min(1, t / T_\alpha) \qquad
        \frac{1}{\ln \beta_3(t)} = \frac{1 - a}{\ln \beta_1} + \frac{a}{\ln \beta_3}, \; a = \min(1, t / T_{\beta_3})

    The slow average's half-life grows linearly from the fast one's to its own.

    Args:
        betas: :math:`\beta_1, \beta_2, \beta_3`.
        alpha: the weight of the slow average, at least 0.
        beta3_warmup, alpha_warmup: :math:`T_{\beta_3}` and :math:`T_\alpha`, in steps, above 0; 1 disables warm-up.
    """

    betas: tuple[float, float, float] = hyper((0.9, 0.999, 0.9999), ge=0, lt=1, role=(*MOMENTS, None))
    eps: float = hyper(1e-8, ge=0)
    alpha: float = hyper(2.0, ge=0)
    beta3_warmup: float = hyper(1.0, gt=0)
    alpha_warmup: float = hyper(1.0, gt=0)
    name = "ademamix"

    @classmethod
    def of(cls, h: Any) -> ScaleByAdEMAMix:
        """The rule of a group whose warm-ups may be None, for none."""
        warmups = (1.0 if n is None else n for n in (h.beta3_warmup, h.alpha_warmup))
        return cls(h.betas, h.eps, h.alpha, *warmups)

    @staticmethod
    def entries(h: dict[str, Any]) -> dict[str, Any]:
        """A group's entries with None for a warm-up of 0 steps."""
        return {**h, "beta3_warmup": h["beta3_warmup"] or None, "alpha_warmup": h["alpha_warmup"] or None}

    def slots(self, param: Tensor) -> dict[str, Slot]:
        averages = {"exp_avg_fast": zeros(param, "rotate"), "exp_avg_slow": zeros(param, "rotate")}
        return {**averages, "exp_avg_sq": zeros(param, "permute")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        b2 = self.betas[1]
        b1, b3 = (torch.as_tensor(b, dtype=torch.float64) for b in (self.betas[0], self.betas[2]))
        a, alpha = ((c.step / n).clamp(max=1) for n in (self.beta3_warmup, self.alpha_warmup))
        b3 = torch.where(a < 1, torch.exp(1 / ((1 - a) / b1.log() + a / b3.log())), b3)
        fast, fast_hat = debiased(s["exp_avg_fast"], u, b1, c.step)
        slow = ema(s["exp_avg_slow"], u, b3)
        v, v_hat = debiased_second_moment(s["exp_avg_sq"], u, b2, c.step)
        mixed = fast_hat + (self.alpha * alpha) * slow
        return c.divide(mixed, v_hat.sqrt(), self.eps), {"exp_avg_fast": fast, "exp_avg_slow": slow, "exp_avg_sq": v}


@dataclass(frozen=True)
class CorrectedDecay(DecayWeights):
    r"""Decoupled weight decay proportional to the current learning rate, Defazio 2025 (arXiv:2506.02285), Algorithm 1.

    .. math:: u + \lambda \frac{\gamma_t}{\gamma_{\max}} p \qquad \gamma_t = \mathrm{lr} \min(1, t / (N + 1))

    The result is multiplied by the learning rate, so a step decays by :math:`\gamma_t^2 \lambda / \gamma_{\max}`.

    Args:
        lr, warmup_steps: the learning rate and ``N``, as in :class:`hbcore.rules.stages.ScaleByLr`.
        max_lr: :math:`\gamma_{\max}`, above 0.
    """

    lr: float = hyper(0.0025, ge=0)
    warmup_steps: float = hyper(0, ge=0)
    max_lr: float = hyper(0.0025, gt=0)

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        rate = self.lr * (c.step / (self.warmup_steps + 1)).clamp(max=1)
        decay: Any = self.weight_decay * (rate / self.max_lr)
        return DecayWeights(decay, self.cautious).update(u, s, c)
