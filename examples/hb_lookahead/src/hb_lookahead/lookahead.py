"""Lookahead, Zhang et al. 2019, around any optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.api import Context, Extension, OptionError, Slot, State, Transform, check_whole, hyper


@dataclass(frozen=True)
class SlowWeights(Transform):
    r"""Slow weights that follow the optimizer's, which return to them every ``k`` steps.

    .. math::
        \phi_0 = \theta_0 \qquad
        \phi_t = \phi_{t-1} + \alpha (\theta_t - \phi_{t-1}), \quad \theta_t \leftarrow \phi_t
        \qquad \text{if } k \text{ divides } t; \text{ else } \phi_t = \phi_{t-1}

    with :math:`\theta_t` the parameter after step ``t``, and ``t`` the parameter's own count of steps.

    Slots: ``slow``, of the parameter's shape, from the first step on. It is kept as precisely as the parameter is computed,
    whatever stores the rest of the state: the parameter takes its value, and would be rounded with it.
    """

    k: int = 5
    alpha: float = hyper(0.5, ge=0, le=1)
    name = "lookahead"
    stage = "after"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("k", self.k, 1)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"slow": Slot(param.shape, exact=True)}

    def joins(self, param: Tensor, step: Tensor) -> dict[str, Tensor]:
        return {"slow": param}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        slow = torch.where(c.step == 1, c.param, s["slow"])
        synchronise = c.step % self.k == 0
        slow = torch.where(synchronise, slow + self.alpha * (u - slow), slow)
        return torch.where(synchronise, slow, u), {"slow": slow}


class Lookahead(Extension):
    r"""Lookahead, Zhang et al. 2019, Lookahead Optimizer: k steps forward, 1 step back (arXiv:1907.08610), Algorithm 1.

    .. math::
        \theta_{t,0} = \phi_{t-1} \qquad
        \theta_{t,i} = \theta_{t,i-1} + A(\theta_{t,i-1}), \quad i = 1 \dots k \qquad
        \phi_t = \phi_{t-1} + \alpha (\theta_{t,k} - \phi_{t-1})

    where :math:`A` is the step of another optimizer: ``Lookahead(params, base="SGD", momentum=0.9)``. Every hyperparameter and
    option of the base is one of Lookahead's. What the base remembers is left as it is when the parameter returns to the slow
    weights, as in most of the paper's experiments.

    The slow weights are the parameters after every ``k``-th step, which are the ones to evaluate; with a base that has a
    second set of weights, as schedule-free ones have, they follow the weights that it trains with.

    Args:
        base: the optimizer's name, or its class.
        k: how many steps the base takes before the slow weights follow, at least 1.
        alpha: :math:`\alpha`, how far they follow, in [0, 1].

    State: ``slow``, of the parameter's shape, and what the base has.
    """

    k: int = 5
    alpha: float = 0.5
    default_base = "AdamW"

    @classmethod
    def chain(cls, h: Any) -> tuple[Transform, ...]:
        return (*super().chain(h), SlowWeights(h.k, h.alpha))

    def after_init(self) -> None:
        super().after_init()
        if self.sparse_gradients:
            raise OptionError("Lookahead: a row without a gradient would miss the k-th step; pass a base with dense gradients.")
