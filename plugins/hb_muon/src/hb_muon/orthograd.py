"""OrthoGrad, Prieto et al. 2025, before LaProp and after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Domain, Optimizer, Route, ScaleByLaProp, State, Transform

ROUNDING = 1024
"""A remainder of at most this many rounding units of the update's norm is rounding error of an update along the weights.

The codec bf16+8 stores moments with 16 significant bits, whose rounding turns an update by some hundred units.
"""


@dataclass(frozen=True)
class OrthoGrad(Transform):
    r"""Take from the update its part along the parameter, Prieto et al. 2025 (arXiv:2501.04697), and give it its norm back.

    .. math::
        r = u - \frac{\langle p, u \rangle}{\langle p, p \rangle}\, p \qquad
        u \leftarrow \frac{\lVert u \rVert}{\lVert r \rVert}\, r

    with the tensor as one vector. The authors' code restores the norm in this way. A parameter of zeros leaves the update
    unchanged; an update along the parameter becomes 0.
    """

    name = "orthograd"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = torch.finfo(u.dtype)
        along = c.sum(c.param * u) / c.sum(c.param * c.param).clamp(min=numbers.tiny)
        rest = u - along * c.param
        # in float64: squares of gradients above 1.8e19 are infinite in float32, and so would the ratio be
        norm, left = c.norm(u.to(torch.float64)), c.norm(rest.to(torch.float64))
        present = (left > ROUNDING * numbers.eps * norm).to(torch.float64)
        return rest * (present * norm / left.clamp(min=numbers.tiny)).to(u.dtype), {}


def has_directions(param: Tensor) -> bool:
    """Whether a parameter has more than one element: the update of a single one is always along it, and would become 0."""
    return param.numel() > 1


class OrthoLaProp(Optimizer):
    r"""LaProp of the gradient's part across the parameter: OrthoGrad, Prieto et al. 2025 (arXiv:2501.04697); HeavyBall's rule.

    .. math::
        h_t = \operatorname{OrthoGrad}(g_t, p_{t-1}) \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{h_t}{\max(\sqrt{v_t / (1 - \beta_2^t)}, \epsilon)} \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(\frac{m_t}{1 - \beta_1^t} + \lambda p_{t-1}\right)

    with LaProp's second moment (arXiv:2002.04839) :math:`v_t` of :math:`h_t`; see :class:`OrthoGrad`. The gradient no longer
    grows or shrinks the parameter, a step still may. A parameter with one element takes LaProp's step.

    Args:
        lr: learning rate.
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
        return (Route(has_directions, (OrthoGrad(),)), ScaleByLaProp(h.betas, h.eps))


class LaPropOrtho(OrthoLaProp):
    r"""LaProp's update without its part along the parameter: OrthoGrad (arXiv:2501.04697) after LaProp; HeavyBall's rule.

    .. math::
        u_t = \operatorname{OrthoGrad}\left(\frac{m_t}{1 - \beta_1^t},\; p_{t-1}\right) \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(u_t + \lambda p_{t-1}\right)

    with LaProp's average :math:`m_t` (arXiv:2002.04839); see :class:`OrthoGrad`. Each step is at right angles to the
    parameter. A parameter with one element takes LaProp's step.

    Args:
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByLaProp(h.betas, h.eps), Route(has_directions, (OrthoGrad(),)))
