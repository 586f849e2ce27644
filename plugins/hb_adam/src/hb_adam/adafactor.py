"""Adafactor, Shazeer and Stern 2018."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hbcore.api import (
    Block,
    Context,
    Counterpart,
    Domain,
    HyperparameterError,
    Optimizer,
    Route,
    Slot,
    State,
    Transform,
    ema,
    hyper,
    second_moment,
)

LARGEST = 1e30
"""The largest square that enters a mean: one that overflowed would make its row and column infinite, and the matrix NaN."""


@dataclass(frozen=True)
class ScaleByFactoredRms(Transform):
    r"""The gradient over its root mean square, estimated from the means of rows and columns; Shazeer and Stern 2018, section 3.

    .. math::
        R_t = (1 - t^\tau) R_{t-1} + t^\tau \operatorname{mean}_j g_{ij}^2 \qquad
        C_t = (1 - t^\tau) C_{t-1} + t^\tau \operatorname{mean}_i g_{ij}^2 \qquad
        u_{ij} = g_{ij} \Big/ \sqrt{\frac{R_i C_j}{\max(\operatorname{mean} R, \epsilon_1)}}

    over the last two dimensions; those before them count matrices.

    Args:
        beta2_decay: :math:`\tau`, at most 0.
        eps1: :math:`\epsilon_1`; None for the last bit of 1 in the dtype that the rule computes in.

    Slots: ``row_var`` and ``col_var``, of the parameter's shape with its last, or last but one, dimension 1. No codec
    compresses them.
    """

    beta2_decay: float = hyper(-0.8, le=0)
    eps1: float | None = None
    name = "factored_rms"
    domain = Domain.MATRIX

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return (Block(0, 1, tuple(shape)),)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        *batch, m, n = param.shape if param.ndim > 1 else (1, 1)  # the slots' names are asked for with shapes of any rank
        return {
            "row_var": Slot(torch.Size((*batch, m, 1)), exact=True),
            "col_var": Slot(torch.Size((*batch, 1, n)), exact=True),
        }

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        eps = smallest(self.eps1, u)
        beta2 = 1 - c.step**self.beta2_decay
        squares = (u * u).clamp(max=LARGEST)
        row = ema(s["row_var"], squares.mean(-1, keepdim=True), beta2)
        col = ema(s["col_var"], squares.mean(-2, keepdim=True), beta2)
        variance = row / row.mean(-2, keepdim=True).clamp(min=eps) * col
        return c.divide(u, variance.sqrt(), eps), {"row_var": row, "col_var": col}


@dataclass(frozen=True)
class ScaleByRisingRms(Transform):
    r"""The gradient over its root mean square, whose decay rises with the step; Shazeer and Stern 2018, section 7.2.

    .. math:: V_t = (1 - t^\tau) V_{t-1} + t^\tau g_t^2 \qquad u_t = g_t / \sqrt{V_t}

    Args:
        beta2_decay, eps1: see :class:`ScaleByFactoredRms`.

    Slots: ``variance``, of the parameter's shape.
    """

    beta2_decay: float = hyper(-0.8, le=0)
    eps1: float | None = None
    name = "rising_rms"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"variance": Slot(param.shape, nonnegative=True)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        variance = second_moment(s["variance"], u, 1 - c.step**self.beta2_decay)
        return c.divide(u, variance.sqrt(), smallest(self.eps1, u)), {"variance": variance}


@dataclass(frozen=True)
class ScaleByParameterRms(Transform):
    r"""An update in proportion to its parameter, and no larger than ``d``; Shazeer and Stern 2018, Algorithm 4.

    .. math::
        \hat u = \frac{u}{\max(1, \operatorname{RMS}(u) / d)} \qquad
        \rho_t = \min(\gamma_t, 1 / \sqrt t) \qquad
        \gamma_t\, u \leftarrow \rho_t \max(\epsilon_2, \operatorname{RMS}(p))\, \hat u

    The learning rate after warm-up, :math:`\gamma_t = \mathrm{lr} \min(1, t / (N + 1))`, multiplies what this returns.

    Args:
        lr, warmup_steps: the learning rate and ``N``, see :class:`hbcore.rules.stages.ScaleByLr`.
        d: the largest root mean square of an update, at least 1.
        eps2: :math:`\epsilon_2`, the least root mean square of a parameter.
    """

    lr: float = hyper(0.01, ge=0)
    warmup_steps: float = hyper(0, ge=0)
    d: float = hyper(1.0, ge=1)
    eps2: float = 1e-3
    name = "parameter_rms"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        rate = self.lr * (c.step / (self.warmup_steps + 1)).clamp(max=1)
        share = 1 / (rate * c.step.sqrt()).clamp(min=1)  # rho_t / gamma_t, at a rate of 0 too
        size = c.mean(c.param * c.param).sqrt().clamp(min=self.eps2)
        excess = (c.mean(u * u).sqrt() / self.d).clamp(min=1)
        return u * (share * size / excess), {}


def smallest(eps1: float | None, like: Tensor) -> float:
    """``eps1``, or where that is None the distance from 1 to the next larger number of ``like``'s dtype."""
    return torch.finfo(like.dtype).eps if eps1 is None else eps1


def has_rows(param: Tensor) -> bool:
    """Whether a parameter has two dimensions or more, of any size: torch factors those."""
    return param.ndim > 1


class Adafactor(Optimizer):
    r"""Adafactor, Shazeer and Stern 2018 (arXiv:1804.04235), Algorithms 4 and 5, in the form of torch.optim.Adafactor.

    .. math::
        V_t \approx \frac{R_t C_t}{\max(\operatorname{mean} R_t, \epsilon_1)} \qquad
        u_t = \frac{g_t}{\max(\sqrt{V_t}, \epsilon_1)} \qquad
        \hat u_t = \frac{u_t}{\max(1, \operatorname{RMS}(u_t) / d)} \\
        p_t = p_{t-1} - \min(\mathrm{lr}, 1 / \sqrt t) \max(\epsilon_2, \operatorname{RMS}(p_{t-1}))\, \hat u_t
        - \mathrm{lr}\, \lambda p_{t-1}

    with moving averages :math:`R_t` and :math:`C_t` of the squared gradient's means over rows and columns, whose decay is
    :math:`1 - t^\tau`. A matrix stores them instead of :math:`V_t`. A parameter of more than two dimensions is a batch of
    matrices, with one root mean square; one of fewer stores :math:`V_t` itself.

    For bfloat16 parameters torch computes in bfloat16, with that dtype's :math:`\epsilon_1`; here both are float32's.

    Args:
        params: complex ones must have fewer than two dimensions.
        lr: the largest relative step, at least 0; the paper's constant of 0.01.
        beta2_decay: :math:`\tau`, at most 0.
        eps: :math:`\epsilon_1`, at least 0 or None for the last bit of 1, and :math:`\epsilon_2`, at least 0. Structure:
            a change compiles anew.
        d: the largest root mean square of an update before it is scaled, at least 1.
        weight_decay: :math:`\lambda`.

    State: ``row_var`` and ``col_var`` of parameters with rows, ``variance`` of others, and ``step``.
    """

    lr: float = 0.01
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    counterpart: ClassVar[Counterpart | None] = Counterpart("Adafactor")

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        eps1, eps2 = floors(h.eps)
        factored, plain = ScaleByFactoredRms(h.beta2_decay, eps1), ScaleByRisingRms(h.beta2_decay, eps1)
        return (
            Route(has_rows, (factored,), (plain,)),
            ScaleByParameterRms(h.lr, h.warmup_steps, h.d, eps2),
        )


def floors(eps: Any) -> tuple[float | None, float]:
    """Adafactor's ``eps``, validated.

    Raises:
        HyperparameterError: it is not a pair of numbers of at least 0, of which the first may be None.
    """
    if not isinstance(eps, (tuple, list)) or len(eps) != 2:
        raise HyperparameterError(f"eps={eps!r} is not a pair; pass (None, 1e-3), or two numbers.")
    for i, x in enumerate(eps):
        number = isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < float("inf")
        if not number and not (i == 0 and x is None):
            raise HyperparameterError(f"eps[{i}]={x!r} is outside [0, inf); pass a number inside that range.")
    return eps[0], eps[1]
