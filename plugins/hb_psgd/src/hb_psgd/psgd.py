"""PSGD with Kronecker-factored whitening preconditioners, Li 2015 and Pooladzandi and Li 2024."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import torch

from hb_psgd.checks import check_flags
from hb_psgd.common import DebiasedAverage, Probability
from hb_psgd.rule import KronFactors, PreconditionByKron
from hbcore.api import HyperparameterError, Optimizer, Transform

FACTORS = tuple(f.name for f in fields(KronFactors) if f.name != "cached")
"""The options that the rules of the family share."""


class KronOptimizer(Optimizer):
    """The options of every optimizer with Kronecker factors; no optimizer itself."""

    lr: float = 0.001
    precond_rule: str = "quad"
    preconditioner_update_probability: Probability = None
    max_size_triangular: int = 2048
    min_ndim_triangular: int = 2
    memory_save_mode: str | None = None
    momentum_into_precond_update: bool = True
    merge_dims: bool | int = False
    split: bool = False
    store_triu_as_line: bool = True
    precond_grad_accum: bool = False
    lower_bound_beta: float = 0.9
    dampening: float = 1e-9
    precond_update_power_iterations: int = 2
    precond_init_scale: float | None = None
    precond_init_scale_scale: float = 1.0
    precond_init_scale_power: float | None = None
    precond_lr: float = 0.1
    q_dtype: str | torch.dtype = "float32"
    hessian_approx: bool = False
    hvp_interval: int = 1
    finite_differences: bool = False
    fallback_to_finite_differences: bool = True
    update_clipping = "trust_region_clip_"
    formerly: ClassVar[Mapping[str, Any]] = {"precond_rule": "pro"}

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        flags = ("momentum_into_precond_update", "store_triu_as_line", "exp_avg_input", "delayed", "cached")
        check_flags({name: h[name] for name in flags if name in h})
        h["q_dtype"] = str(h["q_dtype"]).removeprefix("torch.")
        return {name: value for name, value in h.items() if name != "store_triu_as_line"}


class PSGDKron(KronOptimizer):
    r"""Preconditioned stochastic gradient descent with Kronecker factors: :math:`p \leftarrow p - \mathrm{lr}\, Q^T Q\, m`.

    Pooladzandi and Li 2024 (arXiv:2402.11858), after Li 2015 (arXiv:1512.04202). :class:`hb_psgd.rule.KronFactors` has the
    formulas, :mod:`hb_psgd.factor_rules` the rules by which the factors are fitted to whiten the momentum

    .. math:: m = m_t / (1 - \beta^t) \qquad m_t = \beta m_{t-1} + (1 - \beta)\, g_t

    Args:
        lr: learning rate.
        precond_rule: how the factors are fitted: "quad", which keeps them symmetric, "pro" (Q0.5EQ1.5 with Procrustes steps),
            "qeq", "qep", or "eq" with triangular factors.
        preconditioner_update_probability: refreshes per step, in [0, 1], or a module-level function of the step (1, 2, ...)
            that returns it; None for :func:`hb_psgd.common.update_probability`. At 0 the factors stay as they start.
        max_size_triangular: larger dimensions get a diagonal factor.
        min_ndim_triangular: parameters of fewer dimensions get diagonal factors.
        memory_save_mode: None, "one_diag", "smart_one_diag", "one_triu" or "all_diag": which other factors are diagonal.
        momentum_into_precond_update: fit the factors to the momentum rather than the gradient.
        merge_dims: join all dimensions after the first, or from the last backwards while their product is at most this number.
        split: cut larger dimensions into blocks of ``max_size_triangular``, each with factors of its own.
        store_triu_as_line: HeavyBall's, changes nothing: factors are stored as whole matrices, which are multiplied faster.
        precond_grad_accum: fit the factors to the average of what came since the last refresh.
        lower_bound_beta: decay of the bound on the factors' curvature, in [0, 1).
        dampening: the noise that the factors are fitted with, at least 0.
        precond_update_power_iterations: the number of power iterations for the norms in a refresh, at least 1.
        precond_init_scale: the scale of the factors' product at first; None to take it from the first gradient.
        precond_init_scale_scale, precond_init_scale_power: that scale's factor, and the power it is then raised to.
        precond_lr: learning rate of the factors, in [0, 1].
        q_dtype: what the factors of Q are stored in, "float32" or "bfloat16"; they are fitted in float32 all the same.
        hessian_approx: fit the factors to Hessian-vector products, so that P becomes an inverse Hessian; step takes a closure.
        hvp_interval: the first refresh has a product, and every so manyth after it; the others whiten.
        finite_differences: make products from two calls of the closure, instead of differentiating twice.
        fallback_to_finite_differences: do so where the loss cannot be differentiated twice, with a warning; False for an error.
        beta: decay of the momentum, in [0, 1); None for the default.
        betas: another spelling; its first number overrides ``beta``, the others are ignored.
        exp_avg_input: precondition the momentum; False for the gradient, without any momentum.
        delayed: precondition by the factors before this step's refresh.
        cached: keep the factors of :math:`P = Q^T Q` too, which makes a step without refresh almost twice as fast.
        weight_decay: decoupled.

    State: ``exp_avg``, of the parameter's shape; ``Q_0``, ``Q_1``, ..., a matrix or a diagonal for each dimension larger than
    1; ``P_i`` for each matrix; ``L_0``, ``L_1``, ... and ``init_scale``, one number each; ``step``.
    """

    beta: float | None = 0.9
    betas: Sequence[float] | None = None
    exp_avg_input: bool = True
    delayed: bool = False
    cached: bool = True

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        h = super().normalise(h)
        betas = h.pop("betas")
        if betas is not None and not (isinstance(betas, (tuple, list)) and betas):
            raise HyperparameterError(f"betas={betas!r} has no number; its first is the decay of the momentum.")
        beta = h["beta"] if betas is None else betas[0]
        return {**h, "beta": 0.9 if beta is None else beta}

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return preconditioned(h)


class PSGDPRO(PSGDKron):
    r"""PSGD fitted by the rule Q0.5EQ1.5, or PRO, psgd_torch's default, and without clipping of its updates.

    Args and state are those of :class:`PSGDKron`.
    """

    precond_rule = "pro"
    store_triu_as_line = False
    update_clipping = None  # type: ignore[assignment]


class QSGD(PSGDPRO):
    r"""PSGD that applies the root of its preconditioner: :math:`p \leftarrow p - \mathrm{lr}\, Q\, m` (HeavyBall 3).

    The factors are fitted as those of :class:`PSGDPRO`, whose rule keeps them symmetric and positive, so that :math:`Q` is
    :math:`P^{1/2}`: a matrix form of the root in Adam's denominator.

    A root takes small gradients only half of the way to 1, so that steps are short: ``hbcore compare`` finds a learning rate of
    0.025 best, and the default, which is HeavyBall's, slower than SGD.

    Args and state are those of :class:`PSGDKron`, without ``P_i``: ``cached`` changes nothing.
    """

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return preconditioned(h, root=True)


def preconditioned(h: Any, root: bool = False) -> tuple[Transform, ...]:
    """The chain for a group's hyperparameters ``h``; with ``root``, of Q instead of P."""
    average = DebiasedAverage(h.beta) if h.exp_avg_input else None
    inside = None if h.momentum_into_precond_update else average  # then the rule needs what comes before it too
    rule = PreconditionByKron(
        **{name: getattr(h, name) for name in FACTORS},
        cached=h.cached and not root,
        momentum=inside,
        delayed=h.delayed,
        root=root,
    )
    return (rule,) if average is None or inside is not None else (average, rule)
