"""PSGD with one low-rank preconditioner for a whole group, Pooladzandi and Li 2024."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hb_psgd import lra, lra_passes
from hb_psgd.checks import check_flags, check_number
from hb_psgd.common import EPS, DebiasedAverage, Probability, curvature_of, pair_of, refresh_rate
from hb_psgd.lra_passes import NONE
from hbcore.api import (
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
    hyper,
)

BALANCE = 10
"""U and V are balanced at every tenth refresh, which rewrites both: P stays what it is, and neither outgrows the other."""

FIRST = 0.1
"""The first U and V have about this squared Frobenius norm: the source's choice, so that I + V^T U is nearly the identity."""


def default_rank(numel: int) -> int:
    """The rank for vectors of so many elements: the binary logarithm, rounded, and at least 1."""
    return max(1, round(math.log2(max(1, numel))))


@dataclass(frozen=True)
class PreconditionByLRA(Transform):
    r"""Precondition all parameters of a group, as one vector x, by a low-rank matrix that is fitted to whiten it.

    .. math::
        u = Q^T Q\, x \qquad Q = (I + U V^T)\, \mathrm{diag}(d) \qquad
        \tilde x = x + (\mathrm{dampening} + \epsilon |x|)\, v \qquad v \sim \mathcal N(0, 1)

    When a refresh is due, :func:`hb_psgd.lra.fit` takes a step with the pair :math:`(v, \tilde x)` on d and, in turn, on U or
    V; the source draws lots which. U and V begin as small random numbers, d as one number for all that makes the elements of
    :math:`d^2 x` about 1, at the first x that is not zero among those at the steps 1, 2, 4, 8, ...; until then u is zero.

    Args:
        rank: r; None for :func:`default_rank` of a parameter's elements, which goes with ``multi_tensor=False`` only.
        precond_lr: learning rate of the factors.
        lower_bound_beta: decay of the running bounds on the curvature.
        dampening: the noise that the factors are fitted with.
        eps: the smallest bound on the curvature.
        momentum_into_precond_update: fit to x; otherwise to the gradient as the backward left it.
        delayed: precondition by the factors before this step's refresh.
        preconditioner_update_probability: refreshes per step, as for :class:`hb_psgd.rule.KronFactors`.
        precond_init_scale: the first d; None for ``(a s)^b``, s by :func:`hb_psgd.lra.begun`.
        precond_init_scale_scale, precond_init_scale_power: a and b; None for 1.

    State, for a parameter of shape ``[...]``: ``U`` and ``V``, ``[..., r]``; ``d``, ``[...]``; and ``bounds``, ``[3]``, shared.
    """

    rank: int | None = None
    precond_lr: float = hyper(0.1, ge=0, le=1)
    lower_bound_beta: float = hyper(0.9, ge=0, lt=1)
    dampening: float = hyper(1e-9, ge=0)
    eps: float = hyper(1e-8, ge=0)
    momentum_into_precond_update: bool = True
    delayed: bool = False
    preconditioner_update_probability: Probability = None
    precond_init_scale: float | None = None
    precond_init_scale_scale: float = hyper(1.0, gt=0)
    precond_init_scale_power: float | None = None
    hessian_approx: bool = False
    hvp_interval: int = 1
    finite_differences: bool = False
    fallback_to_finite_differences: bool = True
    name = "psgd_lra"
    domain = Domain.MATRIX
    flat = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            check_whole("rank", self.rank, 1)
        if not callable(self.preconditioner_update_probability):
            check_number("preconditioner_update_probability", self.preconditioner_update_probability, low=0, high=1)
        check_number("precond_init_scale", self.precond_init_scale, low=1e-30)
        check_number("precond_init_scale_power", self.precond_init_scale_power)
        check_whole("hvp_interval", self.hvp_interval, 1)
        flags = ("momentum_into_precond_update", "delayed", "hessian_approx", "finite_differences")
        check_flags({name: getattr(self, name) for name in (*flags, "fallback_to_finite_differences")})

    @property
    def needs(self) -> frozenset[str]:
        gradient = () if self.momentum_into_precond_update else ("grad",)
        return frozenset((*gradient, *(("hvp",) if self.hessian_approx else ())))

    @property
    def curvature(self) -> Curvature:
        return curvature_of(self)

    def rate(self, k: int) -> float:
        return refresh_rate(self.preconditioner_update_probability, k)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        rank = default_rank(param.numel()) if self.rank is None else self.rank
        factor = Slot(torch.Size((*param.shape, rank)), exact=True)
        return {
            "U": factor,
            "V": factor,
            "d": Slot(param.shape, exact=True),
            "bounds": Slot(torch.Size((3,)), shared=True),
        }

    def scalars(self) -> dict[str, float]:
        return {"psgd_lra.fits": 0.0}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        sums, new = lra.Sums(c.total, c.amax), dict[str, Tensor]()
        if c.step == 1:
            for name in ("U", "V"):
                new[name] = _own(name, s, c).copy_(c.probe(s[name])).mul_((FIRST / (c.numel * s[name].shape[1])).sqrt())
        factor_u, factor_v = new.get("U", s["U"]), new.get("V", s["V"])
        pair = pair_of(self, c)
        target = pair[0] if pair is not None else u if self.momentum_into_precond_update else c.grad
        d = new["d"] = self.started(s["d"], target, c, sums)
        before = lra.precondition(u, factor_u, factor_v, d, c.total) if self.delayed else None
        changes = (NONE, NONE)
        if c.refresh:
            fits = s["psgd_lra.fits"]
            fit = lra.fit(
                target, c.probe(u) if pair is None else pair[1], factor_u, factor_v, d, s["bounds"],
                on_u=int(fits) % 2 == 0, balance=int(fits) % BALANCE == 0, lr=self.precond_lr, beta=self.lower_bound_beta,
                eps=self.eps, dampening=self.dampening, relative=EPS, sums=sums, out=c.into("d"),
            )  # fmt: skip
            new |= {"d": fit.d, "bounds": fit.bounds, "psgd_lra.fits": fits + 1}
            changes = (fit.u, fit.v)
            for name, change in zip(("U", "V"), changes, strict=True):
                if change.changes and name not in new:
                    new[name] = _own(name, s, c)
        factor_u, factor_v = new.get("U", factor_u), new.get("V", factor_v)
        if before is not None:
            for factor, change in zip((factor_u, factor_v), changes, strict=True):
                lra_passes.rewrite(factor, change)
            return before, new
        return lra.precondition(u, factor_u, factor_v, new["d"], c.total, c.into("update"), changes), new

    def started(self, d: Tensor, x: Tensor, c: Context, sums: lra.Sums) -> Tensor:
        """``d``, with a first value where it has none."""
        step = int(c.step)
        if step & (step - 1):  # a look at all of x costs as much as a twentieth of a step, and hardly any vector waits for it
            return d
        if self.precond_init_scale is not None:
            return torch.where((d == 0) & (sums.largest(x) > 0), self.precond_init_scale, d)
        power = self.precond_init_scale_power
        return lra.begun(d, x, self.dampening, c.numel, sums, self.precond_init_scale_scale, power)


def _own(name: str, s: State, c: Context) -> Tensor:
    """A slot's memory, or a copy where others need it, to overwrite."""
    memory = c.into(name)
    return s[name].clone() if memory is None else memory


NOT_YET: Mapping[str, Any] = {
    "q_dtype": "float32",
    "precond_grad_accum": False,
}
"""HeavyBall's options that this version accepts by name only, and their only supported values."""


class PSGDLRA(Optimizer):
    r"""Preconditioned stochastic gradient descent with a low-rank matrix: :math:`p \leftarrow p - \mathrm{lr}\, Q^T Q\, m`.

    Pooladzandi and Li 2024 (arXiv:2402.11858), section 4. One preconditioner :math:`Q = (I + U V^T)\,\mathrm{diag}(d)` for all
    parameters of a group, device and dtype; with ``multi_tensor=False`` one for each parameter, which is another optimizer.
    :class:`PreconditionByLRA` has the formulas. A float32 parameter's state takes ``8 rank + 4`` bytes, and its momentum 4.

    Args:
        lr: learning rate.
        beta: decay of the momentum, in [0, 1); None for the default.
        preconditioner_update_probability: refreshes per step, in [0, 1]; None for :func:`hb_psgd.common.update_probability`.
        momentum_into_precond_update: fit the preconditioner to the momentum rather than the gradient.
        rank: the rank of U and V; None for the binary logarithm of the group's number of elements, rounded.
        delayed: precondition by the factors before this step's refresh.
        exp_avg_input: precondition the momentum; False for none.
        eps: the smallest bound on the curvature.
        lower_bound_beta: decay of the bounds on the curvature.
        dampening: the noise that the factors are fitted with.
        precond_init_scale: the first d; None to take it from the first gradient.
        precond_init_scale_scale, precond_init_scale_power: that scale's factor, and the power it is then raised to.
        precond_lr: learning rate of the factors, in [0, 1].
        hessian_approx: fit to Hessian-vector products, so that P becomes an inverse Hessian; step takes a closure.
        hvp_interval: the first refresh has a product, and every so manyth after it; the others whiten.
        finite_differences: make products from two calls of the closure, instead of differentiating twice.
        fallback_to_finite_differences: do so where the loss cannot be differentiated twice, with a warning; False for an error.
        q_dtype, precond_grad_accum: HeavyBall's, not supported; any value but the default is refused.
        weight_decay: decoupled.

    State: ``exp_avg`` and ``d``, of the parameter's shape; ``U`` and ``V``, of that shape and the rank; ``bounds``, three
    numbers, and ``psgd_lra.vector``, one, which are the same for all parameters that have one preconditioner; ``step``.

    Raises:
        HyperparameterError: the rank is larger than the number of the group's elements.
    """

    lr: float = 0.001
    beta: float = 0.9
    preconditioner_update_probability: Probability = None
    momentum_into_precond_update: bool = True
    rank: int | None = None
    delayed: bool = False
    exp_avg_input: bool = True
    eps: float = 1e-8
    lower_bound_beta: float = 0.9
    dampening: float = 1e-9
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
    update_clipping = "trust_region_clip_"

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        for option, only in NOT_YET.items():
            if (value := h.pop(option)) != only:
                raise OptionError(f"{type(self).__name__}: {option}={value!r} is not supported; leave it at {only!r}.")
        return {**h, "beta": 0.9 if h["beta"] is None else h["beta"]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the rank that its size asks for; otherwise as for every optimizer.

        Raises:
            HyperparameterError: the rank is larger than the number of the group's elements.
        """
        given: Any = param_group
        if isinstance(given, dict) and "params" in given and self.settings.multi_tensor:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else [*params]
            param_group = {**param_group, "params": params, "rank": self._rank(params, param_group.get("rank"))}
        super().add_param_group(param_group)

    def _rank(self, params: list[Any], given: int | None) -> int | None:
        rank = self.defaults["rank"] if given is None else given
        members = [p[1] if isinstance(p, tuple) else p for p in params]
        numel = sum(p.numel() for p in members if isinstance(p, Tensor) and not torch.nn.parameter.is_lazy(p))
        if rank is None:
            return default_rank(numel)
        if isinstance(rank, int) and rank > numel > 0:
            raise HyperparameterError(
                f"{type(self).__name__}: rank={rank} is more than the {numel} elements of the parameter group; pass at most "
                f"{numel}, or rank=None."
            )
        return rank

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        rule = PreconditionByLRA(**{name: getattr(h, name) for name in HYPERPARAMETERS})
        return (DebiasedAverage(h.beta), rule) if h.exp_avg_input else (rule,)


HYPERPARAMETERS = tuple(f.name for f in fields(PreconditionByLRA))
"""The rule's fields, which are the optimizer's too."""
