"""Muon, Jordan et al. 2024."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hb_muon.orthogonalize import METHODS, Coefficients, at_least, fastest_method, frobenius, orthogonalize, table
from hb_muon.routing import routing
from hbcore.api import (
    Block,
    Context,
    Domain,
    HyperparameterError,
    Optimizer,
    Options,
    Route,
    ScaleByAdam,
    Slot,
    State,
    Transform,
    ema,
    hyper,
    is_matrix,
    matrix_view,
    zeros,
)

SCALE_MODES = ("none", "scale", "graft")
ADJUST_LR = (None, "original", "match_rms_adamw")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class MuonMomentum(Transform):
    r"""The momentum that Muon orthogonalizes, in torch.optim.Muon's form or, with ``heavyball_momentum``, in HeavyBall's.

    .. math::
        \text{torch:}\quad b_t = \mu b_{t-1} + (1 - \mu) g_t \qquad
        u_t = b_t \;\text{ or, with Nesterov, }\; (1 - \mu) g_t + \mu b_t \\
        \text{HeavyBall:}\quad b_t = \mu b_{t-1} + g_t \qquad
        u_t = b_t \;\text{ or, with Nesterov, }\; g_t + \mu b_t

    The second is :math:`1 / (1 - \mu)` times the first while :math:`\mu` is constant. An orthogonal factor does not depend
    on its matrix's size: they then differ in ``momentum_buffer``, and in the step where ``scale_mode="graft"``.
    """

    momentum: float = hyper(0.9, ge=0, lt=1)
    nesterov: bool = True
    heavyball_momentum: bool = False
    name = "muon_momentum"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"momentum_buffer": zeros(param, "rotate")}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        old, mu = s["momentum_buffer"], self.momentum
        if self.heavyball_momentum:
            buffer = mu * old + u
            ahead = u + mu * buffer
        else:
            buffer = ema(old, u, mu)
            ahead = ema(buffer, u, mu)
        return ahead if self.nesterov else buffer, {"momentum_buffer": buffer}


@dataclass(frozen=True)
class Orthogonalize(Transform):
    r"""Replace each :math:`m \times n` matrix of the update by its orthogonal factor times a scale.

    .. math:: u \leftarrow s \cdot \mathrm{orthogonalize}(u)

    ==================================  =========================  =================================================
    setting                             :math:`s`                  source
    ==================================  =========================  =================================================
    ``scale_mode="none"``               1                          the factor as it is
    ``scale_mode="scale"``              sqrt(max(1, m / n))        Jordan et al. 2024
    ``scale_mode="graft"``              norm(u) / norm(factor)     HeavyBall: the update keeps its own norm
    ``adjust_lr_fn="original"``         sqrt(max(1, m / n))        torch.optim.Muon's name for it
    ``adjust_lr_fn="match_rms_adamw"``  0.2 sqrt(max(m, n))        Liu et al. 2025 (arXiv:2502.16982), section 2.2
    ==================================  =========================  =================================================

    Args:
        eps: the least norm to divide by.
        method, ns_steps, ns_coefficients, dtype: see :func:`hb_muon.orthogonalize.orthogonalize`.
        scale_mode: one of :data:`SCALE_MODES`.
        adjust_lr_fn: one of :data:`ADJUST_LR`; what is not None takes the place of ``scale_mode``.
        flatten: see a weight of more than two dimensions as one matrix ``(o, i h w)``; otherwise as a batch of the matrices
            that its last two dimensions are.
        split: the rows of the matrices that each matrix consists of; none for one.

    Raises:
        HyperparameterError: a setting does not exist, or contradicts another one.
    """

    eps: float = hyper(1e-8, ge=0)
    method: str = "auto"
    ns_steps: int | None = None
    ns_coefficients: Coefficients = None
    dtype: torch.dtype | None = None
    scale_mode: str = "scale"
    adjust_lr_fn: str | None = None
    flatten: bool = True
    split: tuple[int, ...] = ()
    name = "orthogonalize"
    domain = Domain.MATRIX

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", ("auto", *METHODS)), ("scale_mode", SCALE_MODES), ("adjust_lr_fn", ADJUST_LR)):
            if getattr(self, name) not in known:
                raise HyperparameterError(
                    f"{name}={getattr(self, name)!r} does not exist; pass one of {', '.join(map(repr, known))}."
                )
        if self.ns_steps is not None and self.ns_steps not in range(1, 100):
            raise HyperparameterError(f"ns_steps={self.ns_steps!r} must be a whole number from 1 to 99.")
        if self.ns_coefficients is not None:
            table(self.ns_coefficients)
        if self.scale_mode == "graft" and self.adjust_lr_fn is not None:
            raise HyperparameterError(
                f"scale_mode='graft' and adjust_lr_fn={self.adjust_lr_fn!r} both set the scale; pass one of them."
            )

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return matrix_view(shape, split=self.split, batch_dims=0 if self.flatten else max(len(shape) - 2, 0))

    def working_dtype(self, param: Tensor) -> torch.dtype:
        dtype = self.iterate_in(param.dtype, param.device)
        return torch.bfloat16 if dtype == torch.float16 else dtype  # whose range holds no update that is not yet normalised

    def chosen(self, device: torch.device) -> str:
        """The method for updates on ``device``; who sets coefficients or a dtype means the plain iteration."""
        if self.method != "auto":
            return self.method
        plain = self.ns_coefficients is not None or self.dtype is not None
        return "newton_schulz" if plain else fastest_method(device)

    def iterate_in(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """The dtype of the iteration for an update of ``dtype``."""
        return torch.float64 if dtype == torch.float64 else self.dtype or METHODS[self.chosen(device)][1]

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        dtype, scale = self.iterate_in(u.dtype, u.device), self.scale(*u.shape[-2:])
        factor = orthogonalize(u, self.chosen(u.device), self.ns_steps, self.ns_coefficients, dtype, self.eps, scale)
        if self.scale_mode == "graft":
            return factor * (frobenius(u) / at_least(frobenius(factor), self.eps)).to(factor.dtype), {}
        return factor, {}

    def scale(self, m: int, n: int) -> float:
        """The number that the orthogonal factor of an ``m`` by ``n`` matrix is multiplied by."""
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        if self.adjust_lr_fn == "original" or self.scale_mode == "scale":
            return math.sqrt(max(1, m / n))
        return 1.0


class Muon(Optimizer):
    r"""Momentum, orthogonalized: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    .. math::
        b_t = \mu b_{t-1} + (1 - \mu) g_t \qquad u_t = (1 - \mu) g_t + \mu b_t \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(s \cdot \mathrm{orthogonalize}(u_t) + \lambda p_{t-1}\right)

    for each matrix, where :math:`u_t = b_t` without Nesterov's momentum, and :math:`s` is a scale that depends on the matrix's
    shape: see :class:`Orthogonalize`. Parameters with fewer than two dimensions larger than 1 take Adam's step. Embeddings
    and the last layer are matrices too: the author leaves them to AdamW.

    Args:
        params: parameters, named parameters or groups of them; any real floating dtype and shape.
        lr: learning rate.
        betas: decay rates of Adam's two moments, in [0, 1); the first is :math:`\mu` too unless ``momentum`` is given.
        eps: the smallest divisor, at least 0: of Adam's step, and of a matrix's norm.
        nesterov: look ahead along the momentum.
        heavyball_momentum: sum gradients up rather than average them, see :class:`MuonMomentum`.
        momentum: :math:`\mu`, in [0, 1); None for ``betas[0]``, also as a schedule changes that.
        beta: another spelling of ``momentum``; wins if both are given.
        method: ``"newton_schulz"``, ``"gram_newton_schulz"`` (fewer operations where a side is longer), ``"minimax"`` (a closer
            bound to begin with, and four steps; small matrices in float16), ``"exact"`` (a singular value decomposition), or
            ``"auto"``: the fastest on the device, ``"minimax"`` on GPUs and ``"newton_schulz"`` elsewhere; but the latter
            wherever ``ns_coefficients`` or ``ns_dtype`` are given.
        ns_steps: steps of the iteration, from 1 to 99; None for as many as the method needs, 5 or 4.
        ns_coefficients: ``"jordan"``, ``"you"``, ``"polar_express"``, three numbers for all steps, or three for each step;
            None for the method's own: those of ``"you"``, or a variant of ``"polar_express"`` for ``"gram_newton_schulz"``.
            torch.optim.Muon's are ``"jordan"``.
        ns_dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, what the iteration computes in; None for the method's own,
            bfloat16 or, for ``"gram_newton_schulz"``, float16. float64 parameters iterate in float64.
        scale_mode: ``"none"``, ``"scale"`` or ``"graft"``.
        adjust_lr_fn: ``"original"`` or ``"match_rms_adamw"``, which takes the place of ``scale_mode``.
        flatten: see a convolution ``(o, i, h, w)`` as one matrix ``(o, i h w)``; False sees the last two dimensions of
            any such weight as matrices, and those before them as a batch, as for experts ``(e, o, i)``.
        split_sizes: the rows of the matrices that a weight consists of, ``(d, d, d)`` for a fused q, k, v of ``(3 d, d)``;
            set it for the param group of such weights.
        **options: ``weight_decay`` is :math:`\lambda`; for all of them see :class:`hbcore.api.Options`.

    State: ``momentum_buffer``, or ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option does not exist.
        ParameterError: ``params`` is unusable.
        HyperparameterError: a setting does not exist, or ``split_sizes`` does not add up to a weight's rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0025,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        nesterov: bool = True,
        heavyball_momentum: bool = False,
        momentum: float | None = None,
        beta: float | None = None,
        method: str = "auto",
        ns_steps: int | None = None,
        ns_coefficients: Coefficients = None,
        ns_dtype: str | torch.dtype | None = None,
        scale_mode: str = "scale",
        adjust_lr_fn: str | None = None,
        flatten: bool = True,
        split_sizes: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "nesterov": nesterov,
            "heavyball_momentum": heavyball_momentum,
            "momentum": momentum if beta is None else beta,
            "method": method,
            "ns_steps": ns_steps,
            "scale_mode": scale_mode,
            "adjust_lr_fn": adjust_lr_fn,
            "flatten": flatten,
            **as_data(ns_coefficients, ns_dtype, split_sizes),
        }
        super().__init__(params, hyperparameters, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        # None is structure, not a number: a group that leaves its momentum to betas follows them through every schedule.
        momentum = MuonMomentum(h.betas[0] if h.momentum is None else h.momentum, h.nesterov, h.heavyball_momentum)
        return (Route(is_matrix, (momentum, orthogonalizer(h)), (ScaleByAdam(h.betas, h.eps),)),)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{routing(self.param_groups, lambda _, p: is_matrix(p), 'Muon', 'Adam')}"


def as_data(
    ns_coefficients: Coefficients, ns_dtype: str | torch.dtype | None, split_sizes: Sequence[int] | None
) -> dict[str, Any]:
    """Those settings of :class:`Muon` in the one form that its param groups hold, and its checkpoints."""
    if ns_coefficients is not None and not isinstance(ns_coefficients, str):
        ns_coefficients = table(ns_coefficients)
    return {
        "ns_coefficients": ns_coefficients,
        "ns_dtype": None if ns_dtype is None else str(ns_dtype).removeprefix("torch."),
        "split_sizes": None if split_sizes is None else tuple(split_sizes),
    }


def orthogonalizer(h: Any) -> Orthogonalize:
    """The rule that a group's hyperparameters ``h`` describe."""
    return Orthogonalize(
        h.eps,
        h.method,
        h.ns_steps,
        h.ns_coefficients,
        dtype_of(h.ns_dtype),
        h.scale_mode,
        h.adjust_lr_fn,
        h.flatten,
        h.split_sizes or (),
    )


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype called ``name``.

    Raises:
        HyperparameterError: matrices are not iterated in it.
    """
    if name is not None and name not in DTYPES:
        raise HyperparameterError(f"ns_dtype={name!r} does not exist; pass one of {', '.join(DTYPES)}, or None.")
    return None if name is None else DTYPES[name]
