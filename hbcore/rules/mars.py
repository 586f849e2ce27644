"""MARS: gradients corrected by their change since the previous step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hbcore.rules.transform import Context, Slot, State, Transform, hyper, zeros


@dataclass(frozen=True)
class Mars(Transform):
    r"""The variance-reduced gradient of Yuan et al. 2024, MARS (arXiv:2411.10438), Algorithm 1, in its approximate form.

    .. math::
        c_t = g_t + \gamma \frac{\beta_1}{1 - \beta_1} (g_t - g_{t-1})

    Later transforms use :math:`c_t` as the gradient. The paper then clips it to unit norm per tensor. That is
    ``gradient_clipping="l2_clip_"``, which runs right after this stage; as in HeavyBall it is left to the user: it costs a
    pass over memory and matters little before a normalising rule.

    A parameter's first step has no :math:`g_{t-1}` and hence no correction: the paper starts from :math:`x_1 = x_0`, where the
    difference is zero. (The authors' code starts from :math:`g_0 = 0`; so does this if the option is enabled mid-training.)

    "Approximate" because :math:`g_{t-1}` is the previous step's gradient on the previous batch; the exact form evaluates the
    current batch at the previous parameters, which costs a second backward pass.

    Args:
        mars_gamma: :math:`\gamma`; 0.025 in the paper, 0.0025 by default, as in HeavyBall.
        beta: :math:`\beta_1`, the decay rate of the chain's first moment.

    State: ``mars_prev_grad``, the previous step's gradient, in the parameter's shape.
    """

    mars_gamma: float = hyper(0.0025, ge=0)
    beta: float = hyper(0.9, ge=0, lt=1)
    name = "mars"
    stage = "mars"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"mars_prev_grad": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        scale = self.mars_gamma * self.beta / (1 - self.beta)
        later = (c.step - 1).clamp(max=1)  # 0 on the first step, then 1
        return u + (scale * later) * (u - s["mars_prev_grad"]), {"mars_prev_grad": u}
