"""Transforms inserted by the shared options, and the order of all stages.

An option inserts a transform and never changes another one, so enabling it on resume adds its slots and leaves other state
alone. :data:`ORDER` alone defines the order; a test pins it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hbcore.rules.domain import ORDER as ORDER
from hbcore.rules.numerics import ema
from hbcore.rules.transform import Context, Domain, Slot, State, Transform, hyper


def arrange(transforms: Iterable[Transform]) -> tuple[Transform, ...]:
    """Sort transforms by :data:`ORDER`; those of one stage (the rule's own chain) keep the order they came in."""
    return tuple(sorted(transforms, key=lambda t: ORDER.index(t.stage)))


@dataclass(frozen=True)
class CoupleDecay(Transform):
    """L2 regularisation: ``g + weight_decay * p`` before the rule sees the gradient, as in torch.optim.SGD and Adam."""

    weight_decay: float = hyper(0.0, ge=0, role="weight_decay")
    name = "couple_decay"
    stage = "couple_decay"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u + self.weight_decay * c.param, {}


@dataclass(frozen=True)
class Caution(Transform):
    r"""Keep only the elements of the update that agree in sign with the gradient, and rescale them to compensate.

    .. math:: \phi = \mathbb 1[u \cdot g > 0] \qquad u \leftarrow u\,\phi / \max(\overline{\phi}, 10^{-3})

    Liang et al. 2024, Cautious Optimizers (arXiv:2411.16085), in the form of the authors' code.
    """

    name = "caution"
    stage = "caution"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        agrees = (u * c.grad > 0).to(u.dtype)
        return u * agrees / c.mean(agrees).clamp(min=1e-3), {}


@dataclass(frozen=True)
class DecayWeights(Transform):
    r"""Decoupled weight decay, :math:`u + \lambda p`, Loshchilov and Hutter 2019 (arXiv:1711.05101).

    With ``cautious``, only where update and parameter agree in sign, :math:`u p > 0`: Chen et al. 2025, Cautious Weight
    Decay (arXiv:2510.12402). The learning rate multiplies both, so the decay per step is ``lr * weight_decay``.
    """

    weight_decay: float = hyper(0.0, ge=0, role="weight_decay")
    cautious: bool = False
    name = "weight_decay"
    stage = "weight_decay"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        decay = self.weight_decay * c.param
        return u + (torch.where(u * c.param > 0, decay, 0.0) if self.cautious else decay), {}


@dataclass(frozen=True)
class ScaleByLr(Transform):
    r"""The learning rate and its linear warm-up, :math:`u \cdot \mathrm{lr} \cdot \min(1, t / (N + 1))`.

    ``t`` is the parameter's own step and ``N`` is ``warmup_steps``.
    """

    lr: float = hyper(1e-3, ge=0)
    warmup_steps: float = hyper(0, ge=0)
    name = "lr"
    stage = "lr"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u * (self.lr * (c.step / (self.warmup_steps + 1)).clamp(max=1)), {}


@dataclass(frozen=True)
class Apply(Transform):
    """``p - u``: from here on the update *is* the new parameter."""

    name = "apply"
    stage = "apply"

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return c.param - u, {}


@dataclass(frozen=True)
class ParameterEMA(Transform):
    r"""A moving average of the weights themselves, Polyak and Juditsky 1992; training does not use it.

    .. math:: a_t = (1 - d)\, a_{t-1} + d\, p_t \qquad \text{read as } a_t / (1 - (1 - d)^t)

    If enabled on resume, the average starts from the current weights.
    """

    ema_decay: float = hyper(0.001, ge=0, le=1)
    name = "parameter_ema"
    stage = "parameter_ema"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"param_ema": Slot(param.shape, exact=True)}  # it moves by a thousandth of what it is, at most

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u, {"param_ema": ema(s["param_ema"], u, 1 - self.ema_decay)}

    def joins(self, param: Tensor, step: Tensor) -> dict[str, Tensor]:
        return {"param_ema": param * (1 - (1 - self.ema_decay) ** step)}

    def average(self, s: State, step: Tensor) -> Tensor:
        """The average, corrected for its initialisation at zero."""
        return s["param_ema"] / (1 - (1 - self.ema_decay) ** step).to(s["param_ema"].dtype)
