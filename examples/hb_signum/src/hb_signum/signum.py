"""Signum, Bernstein et al. 2018: the sign of the momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Optimizer, Slot, State, Transform, ema, hyper, zeros


@dataclass(frozen=True)
class ScaleBySignum(Transform):
    r"""The sign of a running average of gradients.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t \qquad u_t = \mathrm{sign}(m_t)

    Slots: ``exp_avg``, of the parameter's shape.
    """

    beta: float = hyper(0.9, ge=0, lt=1, role="first_moment")
    name = "signum"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"exp_avg": zeros(param, "rotate")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        m = ema(s["exp_avg"], u, self.beta)
        return torch.sign(m), {"exp_avg": m}


class Signum(Optimizer):
    r"""Signum, Bernstein et al. 2018, signSGD: Compressed Optimisation for Non-Convex Problems (arXiv:1802.04434), Algorithm 2,
    on one worker.

    Args:
        lr: the learning rate :math:`\delta`, which is the size of every element's step.
        beta: :math:`\beta`, the decay rate of the average, in [0, 1); 0 for signSGD.

    State: 4 bytes per parameter in float32.
    """

    lr: float = 1e-4
    beta: float = 0.9

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleBySignum(h.beta),)
