"""Scion, Pethick et al. 2025."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hb_muon.orthogonalize import Coefficients
from hb_muon.rules import MuonMomentum, Orthogonalize, as_data, orthogonalizer
from hbcore.api import (
    Block,
    Context,
    Domain,
    HyperparameterError,
    Optimizer,
    Route,
    State,
    Transform,
    hyper,
    matrix_view,
)

NORMS = ("spectral", "sign")


@dataclass(frozen=True)
class WeightLMO(Transform):
    r"""The point of a norm's ball of radius ``scale`` that lies furthest along the update, for weights ``(o, i, *window)``.

    =============  ======================================================  ============================================
    ``norm``       the update becomes                                      the norm of a weight
    =============  ======================================================  ============================================
    ``spectral``   :math:`\rho \sqrt{o / i} \,/ k \cdot U V^T`             how much of the input's rms an output can be
    ``sign``       :math:`\rho / (i k) \cdot \operatorname{sgn}(u)`        how large an output of inputs within 1 can be
    =============  ======================================================  ============================================

    Pethick et al. 2025 (arXiv:2502.07529), and their code for convolutions: :math:`U V^T` is the orthogonal
    factor of the weight as one matrix ``(o, i k)``, and :math:`k` the number of positions of the window, 1 for a linear layer.

    Args:
        scale: :math:`\rho`, at least 0.
        norm: one of :data:`NORMS`.
        factor: how to compute :math:`U V^T`, without a scale of its own, and how to split a weight into several.
    """

    scale: float = hyper(1.0, ge=0)
    norm: str = "spectral"
    factor: Orthogonalize = field(default_factory=lambda: Orthogonalize(scale_mode="none"))
    name = "weight_lmo"
    domain = Domain.MATRIX

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in NORMS:
            raise HyperparameterError(f"norm={self.norm!r} does not exist; pass one of {', '.join(map(repr, NORMS))}.")

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        batch = 0 if self.factor.flatten else len(shape) - 2
        return matrix_view(shape, merge_dims=False, split=self.factor.split, batch_dims=batch)

    def working_dtype(self, param: Tensor) -> torch.dtype:
        return self.factor.working_dtype(param)

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        [result] = self.update_stacks([(u, s, c)])
        return result

    def update_stacks(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        if self.norm == "sign":
            for u, _, _ in stacks:
                yield torch.sign(u) * (self.scale / math.prod(u.shape[2:])), {}
            return
        factors = self.factor.update_stacks([(u.flatten(2), {}, c) for u, _, c in stacks])
        for (u, _, _), (factor, _) in zip(stacks, factors, strict=True):
            _, outputs, inputs, *window = u.shape
            yield factor.view(u.shape) * (self.scale * (math.sqrt(outputs / inputs) / math.prod(window))), {}


@dataclass(frozen=True)
class BiasLMO(Transform):
    r"""The same for a bias and the norm :math:`\operatorname{rms}`: :math:`\rho\, u / \max(\operatorname{rms}(u), \epsilon)`.

    For a single number that is its sign. The division is the division backend's.
    """

    scale: float = hyper(1.0, ge=0)
    eps: float = hyper(1e-8, ge=0)
    name = "bias_lmo"
    domain = Domain.TENSOR

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return c.divide(u, c.mean(u * u).sqrt(), self.eps) * self.scale, {}


def is_weight(param: Tensor) -> bool:
    """Whether a parameter has outputs and inputs: two dimensions or more."""
    return param.ndim > 1


class Scion(Optimizer):
    r"""Steps to the boundary of a norm's ball: Pethick et al. 2025 (arXiv:2502.07529), Algorithm 1, unconstrained Scion.

    .. math::
        b_t = \mu b_{t-1} + (1 - \mu) g_t \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(\operatorname{lmo}(b_t) + \lambda p_{t-1}\right)

    where the linear minimization oracle :math:`\operatorname{lmo}` of a weight is :class:`WeightLMO`, the orthogonal factor
    times :math:`\rho \sqrt{o / i} / k`, and that of parameters with fewer than two dimensions is :class:`BiasLMO`,
    :math:`\rho\, b_t / \operatorname{rms}(b_t)`. The paper's constrained form, Algorithm 2, is ``weight_decay=1``: weights
    whose norm is within :math:`\rho` then stay within it. The paper starts from :func:`init_scion_`; call it yourself, as an
    optimizer changes no weight before its first step.

    Args:
        params: of any real floating dtype and shape.
        lr: learning rate.
        momentum: :math:`\mu`, in [0, 1); the paper's :math:`1 - \alpha`.
        eps: the smallest divisor, at least 0: of a bias's root mean square, and of a matrix's norm.
        scale: :math:`\rho`, the radius, at least 0. The paper uses 50 for hidden layers and 3000 for the last one.
        norm: ``"spectral"``; or ``"sign"``, for the param group of a language model's last layer and embedding.
        method, ns_steps, ns_coefficients, ns_dtype, flatten, split_sizes: as in :class:`hb_muon.Muon`.
        beta: another spelling of ``momentum``, which it overrides.
        betas: HeavyBall's spelling; the first overrides ``momentum``, the others are ignored.
        weight_decay: :math:`\lambda`.

    State: ``momentum_buffer``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    momentum: float = 0.9
    eps: float = 1e-8
    scale: float = 1.0
    norm: str = "spectral"
    method: str = "auto"
    ns_steps: int | None = None
    ns_coefficients: Coefficients = None
    ns_dtype: str | torch.dtype | None = None
    flatten: bool = True
    split_sizes: Sequence[int] | None = None
    beta: float | None = None
    betas: Sequence[float] | None = None

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        beta, betas = h.pop("beta"), h.pop("betas")
        if beta is None:
            beta = betas[0] if betas else h["momentum"]
        return as_data({**h, "momentum": beta})

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        lmo = Route(is_weight, (WeightLMO(h.scale, h.norm, orthogonalizer(h)),), (BiasLMO(h.scale, h.eps),))
        return (MuonMomentum(h.momentum, nesterov=False), lmo)


@torch.no_grad()
def init_scion_(module: nn.Module, scale: float = 1.0, generator: torch.Generator | None = None) -> nn.Module:
    r"""Initialise a model as in the code of Pethick et al. 2025 (arXiv:2502.07529), on the boundary of the spectral ball.

    A weight ``(o, i, *window)`` becomes, at each of the :math:`k` positions of its window, a random (semi-)orthogonal matrix
    times :math:`\rho \sqrt{o / i} / k`; a parameter of one dimension whose name ends in bias becomes 0. All else, such as
    the gain of a normalisation, is unchanged. Numbers are drawn on the CPU, so that a seed gives the same weights everywhere.

    Args:
        module: the model, or a part of it with a scale of its own; changed in place. Its parameters must not be sharded.
        scale: :math:`\rho`.
        generator: the CPU's global one by default.

    Returns:
        The module.
    """
    for name, p in module.named_parameters():
        if p.ndim > 1:
            outputs, inputs, *window = p.shape
            places = math.prod(window)
            gain = scale * math.sqrt(outputs / inputs) / places
            drawn = [torch.empty(outputs, inputs, dtype=torch.float64) for _ in range(places)]
            for weight in drawn:
                nn.init.orthogonal_(weight, gain, generator)
            p.copy_(torch.stack(drawn, dim=-1).view(p.shape))
        elif p.ndim == 1 and name.endswith("bias"):
            p.zero_()
    return module
