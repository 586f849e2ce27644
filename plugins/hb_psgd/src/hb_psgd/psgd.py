"""PSGD with a Kronecker-factored whitening preconditioner, Li 2015 and Pooladzandi and Li 2024."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hb_psgd import kron, newton
from hbcore.api import (
    Block,
    Context,
    Curvature,
    Domain,
    HyperparameterError,
    Optimizer,
    OptionError,
    Slot,
    State,
    Transform,
    check_whole,
    debiased,
    hyper,
    matrix_view,
    zeros,
)

Probability: TypeAlias = "float | Callable[[int], float] | None"

EPS = torch.finfo(torch.float32).eps
"""The dampening relative to the gradient: float32's rounding unit for every dtype."""

RULES = {"pro": kron.pro_update}
"""How the factors follow the gradient, by name."""
NEWTON = {"pro": newton.newton_update}
"""How they follow a Hessian-vector product."""


def update_probability(k: int) -> float:
    """The default number of refreshes per step k (1, 2, ...): 1 for 1000 steps, then less, finally 0.03.

    ``max(0.03, min(1, 0.999^(k - 1000)))``
    """
    return max(0.03, min(1.0, 0.999 ** (k - 1000)))


@dataclass(frozen=True)
class PreconditionByKron(Transform):
    r"""Precondition by Kronecker factors that are fitted to whiten their input.

    .. math::
        x = m_t / (1 - \beta^t) \;\text{ with }\; m_t = \beta m_{t-1} + (1 - \beta)\, g_t, \;\text{ or }\; x = g_t \\
        \tilde x = x + (\mathrm{dampening} + \epsilon |x|)\, v \qquad v \sim \mathcal N(0, 1) \qquad
        Q \leftarrow \mathrm{rule}(Q, \tilde x) \;\text{ when due} \qquad u_t = Q^T Q\, x

    The factors start as multiples of the identity at a block's first gradient that is not zero; until then u is zero. With
    ``hessian_approx`` refreshes that have a Hessian-vector product fit and start the factors by :mod:`hb_psgd.newton` instead:
    x is the product there, dampened like a gradient.

    Args:
        beta: decay of the momentum.
        precond_lr: learning rate of the factors.
        lower_bound_beta: decay of the running bound on the factors' curvature.
        dampening: the noise that the factors are fitted with.
        exp_avg_input: precondition the momentum; otherwise the gradient, without any momentum.
        momentum_into_precond_update: fit the factors to the momentum; otherwise to the gradient.
        delayed: precondition by the factors before this step's refresh.
        preconditioner_update_probability: the number of refreshes per step, in [0, 1]: a number, a module-level function of
            the step (1, 2, ...), or None for :func:`update_probability`. Not random: a refresh is due whenever the sum of them
            passes a whole number.
        max_size_triangular, min_ndim_triangular, memory_save_mode: which factors are dense, :func:`hb_psgd.kron.memory_layout`.
        merge_dims: how dimensions are joined, :func:`hbcore.api.matrix_view`; those of size 1 are dropped first.
        precond_update_power_iterations: of :func:`hb_psgd.kron.norm_bound`.
        precond_init_scale: the scale of Q at first; None for ``(a s)^b``, s by :func:`hb_psgd.kron.whitening_scale`.
        precond_init_scale_scale, precond_init_scale_power: a and b; None for 1.
        hessian_approx: fit the factors to Hessian-vector products, for which ``step`` takes a closure.
        hvp_interval: the first refresh has a product, and every so manyth after it; the others whiten.
        finite_differences: products by finite differences, :mod:`hbcore.engine.curvature`.
        fallback_to_finite_differences: use them where the loss cannot be differentiated twice, with a warning.
        rule: one of :data:`RULES`.
    """

    beta: float = hyper(0.9, ge=0, lt=1, role="first_moment")
    precond_lr: float = hyper(0.1, ge=0, le=1)
    lower_bound_beta: float = hyper(0.9, ge=0, lt=1)
    dampening: float = hyper(1e-9, ge=0)
    exp_avg_input: bool = True
    momentum_into_precond_update: bool = True
    delayed: bool = False
    preconditioner_update_probability: Probability = None
    max_size_triangular: int = 2048
    min_ndim_triangular: int = 2
    memory_save_mode: str | None = None
    merge_dims: bool | int = False
    precond_update_power_iterations: int = 2
    precond_init_scale: float | None = None
    precond_init_scale_scale: float = hyper(1.0, gt=0)
    precond_init_scale_power: float | None = None
    hessian_approx: bool = False
    hvp_interval: int = 1
    finite_differences: bool = False
    fallback_to_finite_differences: bool = True
    rule: str = "pro"
    name = "psgd_kron"
    domain = Domain.MATRIX

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in RULES:
            raise OptionError(f"rule={self.rule!r} is not one of {', '.join(RULES)}.")
        kron.memory_layout((), memory_save_mode=self.memory_save_mode)  # raises if the mode does not exist
        if not callable(self.preconditioner_update_probability):
            _check("preconditioner_update_probability", self.preconditioner_update_probability, low=0, high=1)
        check_whole("precond_update_power_iterations", self.precond_update_power_iterations, 1)
        check_whole("max_size_triangular", self.max_size_triangular, 0)
        check_whole("min_ndim_triangular", self.min_ndim_triangular, 0)
        if not isinstance(self.merge_dims, bool):
            check_whole("merge_dims", self.merge_dims, 1)
        _check("precond_init_scale", self.precond_init_scale, low=1e-30)
        _check("precond_init_scale_power", self.precond_init_scale_power)
        check_whole("hvp_interval", self.hvp_interval, 1)
        for name in ("hessian_approx", "finite_differences", "fallback_to_finite_differences"):
            if not isinstance(value := getattr(self, name), bool):
                raise HyperparameterError(f"{name}={value!r} is neither True nor False; pass one of them.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hvp"}) if self.hessian_approx else frozenset()

    @property
    def curvature(self) -> Curvature:
        return Curvature(self.hvp_interval, self.finite_differences, self.fallback_to_finite_differences)

    def rate(self, k: int) -> float:
        p = self.preconditioner_update_probability
        if p is None:
            return update_probability(k)
        return min(1.0, max(0.0, float(p(k)))) if callable(p) else float(p)

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return matrix_view([n for n in shape if n != 1] or [1], self.merge_dims)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        shape = param.shape or torch.Size([1])
        dense = kron.memory_layout(shape, self.max_size_triangular, self.min_ndim_triangular, self.memory_save_mode)
        slots = {"exp_avg": zeros(param)} if self.exp_avg_input else {}
        slots["init_scale"] = Slot(torch.Size(), exact=True)
        for i, n in enumerate(shape):
            slots[f"Q_{i}"] = Slot(torch.Size((n, n) if dense[i] else (n,)), exact=True)
            slots[f"L_{i}"] = Slot(torch.Size(), exact=True)
        return slots

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        new, x = {}, u
        if self.exp_avg_input:
            new["exp_avg"], x = debiased(s["exp_avg"], u, self.beta, c.step)
        target = x if self.momentum_into_precond_update else u
        h, v = (c.hvp, c.vector) if self.hessian_approx else (None, None)
        new["init_scale"], factors = self.started(target, s, h, v)
        before = factors
        if c.refresh:
            bounds = [s[f"L_{i}"] for i in range(len(factors))]
            fitted = target if h is None else h
            dampened = fitted + (self.dampening + EPS * fitted.abs()) * c.probe(fitted)
            rule = RULES[self.rule] if v is None else partial(NEWTON[self.rule], v=v)
            made, risen = rule(
                dampened, factors=factors, bounds=bounds, lr=self.precond_lr, beta=self.lower_bound_beta, probe=c.probe,
                iterations=self.precond_update_power_iterations,
            )  # fmt: skip
            kept = kron.kept_where_finite([*factors, *bounds], [*made, *risen])
            factors, bounds = kept[: len(made)], kept[len(made) :]
            new |= {f"L_{i}": bound for i, bound in enumerate(bounds)}
        new |= {f"Q_{i}": q for i, q in enumerate(factors)}
        return kron.precondition(x, before if self.delayed else factors), new

    def started(self, x: Tensor, s: State, h: Tensor | None, v: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Q's initial scale, ``[B]``, and the factors, initialised in blocks where they were not and ``x`` is not zero."""
        factors = [s[f"Q_{i}"] for i in range(x.ndim - 1)]
        waiting = s["init_scale"] == 0
        if self.precond_init_scale is not None:
            first = torch.full_like(s["init_scale"], self.precond_init_scale)
        else:
            first = self.precond_init_scale_scale * newton.first_scale(x, h, v, self.dampening)
            if self.precond_init_scale_power is not None:
                first = torch.where(first > 0, first**self.precond_init_scale_power, 0.0)
        scale = torch.where(waiting, first.to(x.dtype), s["init_scale"])
        return scale, kron.begin(factors, waiting, scale)


def _check(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise HyperparameterError unless ``value`` is None or a finite number from ``low`` to ``high``."""
    if value is None:
        return
    try:
        fits = math.isfinite(value) and low <= value <= high
    except TypeError:
        fits = False
    if not fits:
        raise HyperparameterError(f"{name}={value!r} is not a finite number in [{low:g}, {high:g}]; pass one, or leave it out.")


NOT_YET: Mapping[str, Any] = {
    "q_dtype": "float32",
    "precond_grad_accum": False,
    "cached": True,
    "store_triu_as_line": True,
}
"""HeavyBall's options that this version accepts by name only, and their only supported values."""


class PSGDKron(Optimizer):
    r"""Preconditioned stochastic gradient descent with Kronecker factors: :math:`p \leftarrow p - \mathrm{lr}\, Q^T Q\, m`.

    Pooladzandi and Li 2024 (arXiv:2402.11858), after Li 2015 (arXiv:1512.04202). :class:`PreconditionByKron` has the formulas,
    :func:`hb_psgd.kron.pro_update` the rule by which the factors are fitted.

    Args:
        lr: learning rate.
        beta: decay of the momentum, in [0, 1); None for the default.
        betas: another spelling; its first number overrides ``beta``, the others are ignored.
        preconditioner_update_probability: refreshes per step, in [0, 1]; None for :func:`update_probability`.
        max_size_triangular: larger dimensions get a diagonal factor.
        min_ndim_triangular: parameters of fewer dimensions get diagonal factors.
        memory_save_mode: None, "one_diag", "smart_one_diag", "one_triu" or "all_diag": which other factors are diagonal.
        momentum_into_precond_update: fit the factors to the momentum rather than the gradient.
        merge_dims: join dimensions.
        delayed: precondition by the factors before this step's refresh.
        exp_avg_input: precondition the momentum; False for none.
        lower_bound_beta: decay of the bound on the factors' curvature.
        dampening: the noise that the factors are fitted with.
        precond_update_power_iterations: the number of power iterations for the norms in a refresh.
        precond_init_scale: the scale of the factors' product at first; None to take it from the first gradient.
        precond_init_scale_scale, precond_init_scale_power: that scale's factor, and the power it is then raised to.
        precond_lr: learning rate of the factors, in [0, 1].
        hessian_approx: fit the factors to Hessian-vector products, so that P becomes an inverse Hessian; step takes a closure.
        hvp_interval: the first refresh has a product, and every so manyth after it; the others whiten.
        finite_differences: make products from two calls of the closure, instead of differentiating twice.
        fallback_to_finite_differences: do so where the loss cannot be differentiated twice, with a warning; False for an error.
        q_dtype, precond_grad_accum, cached, store_triu_as_line: HeavyBall's, not supported yet; any value but the default is
            refused.
        weight_decay: decoupled.

    State: ``exp_avg``, of the parameter's shape; ``Q_0``, ``Q_1``, ..., a matrix or a diagonal for each dimension larger than
    1; ``L_0``, ``L_1``, ... and ``init_scale``, one number each; ``step``.
    """

    lr: float = 0.001
    beta: float = 0.9
    betas: tuple[float, ...] | None = None
    preconditioner_update_probability: Probability = None
    max_size_triangular: int = 2048
    min_ndim_triangular: int = 2
    memory_save_mode: str | None = None
    momentum_into_precond_update: bool = True
    merge_dims: bool | int = False
    delayed: bool = False
    exp_avg_input: bool = True
    lower_bound_beta: float = 0.9
    dampening: float = 1e-9
    precond_update_power_iterations: int = 2
    precond_init_scale: float | None = None
    precond_init_scale_scale: float = 1.0
    precond_init_scale_power: float | None = None
    precond_lr: float = 0.1
    hessian_approx: bool = False
    hvp_interval: int = 1
    finite_differences: bool = False
    fallback_to_finite_differences: bool = True
    q_dtype: str = "float32"
    precond_grad_accum: bool = False
    cached: bool = True
    store_triu_as_line: bool = True
    update_clipping = "trust_region_clip_"

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        for option, only in NOT_YET.items():
            if (value := h.pop(option)) != only:
                raise OptionError(f"{type(self).__name__}: {option}={value!r} is not supported yet; leave it at {only!r}.")
        betas = h.pop("betas")
        if betas is not None and not betas:
            raise HyperparameterError(f"betas={betas!r} has no number; its first is the decay of the momentum.")
        beta = h["beta"] if betas is None else betas[0]
        return {**h, "beta": 0.9 if beta is None else beta}

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (PreconditionByKron(**{name: getattr(h, name) for name in HYPERPARAMETERS}),)


HYPERPARAMETERS = tuple(f.name for f in fields(PreconditionByKron) if f.name != "rule")
"""The rule's fields that are the optimizer's too."""
