"""Muon, Jordan et al. 2024."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hb_muon.orthogonalize import Coefficients
from hb_muon.routing import routing
from hb_muon.rules import MuonMomentum, as_data, orthogonalizer
from hbcore.api import Optimizer, Options, Route, ScaleByAdam, Transform, is_matrix


class Muon(Optimizer):
    r"""Momentum, orthogonalized: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    .. math::
        b_t = \mu b_{t-1} + (1 - \mu) g_t \qquad u_t = (1 - \mu) g_t + \mu b_t \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(s \cdot \mathrm{orthogonalize}(u_t) + \lambda p_{t-1}\right)

    for each matrix, where :math:`u_t = b_t` without Nesterov's momentum, and :math:`s` is a scale that depends on the matrix's
    shape: see :class:`hb_muon.rules.Orthogonalize`. Parameters with fewer than two dimensions larger than 1 take Adam's step.
    Embeddings and the last layer are matrices too: the author leaves them to AdamW.

    Args:
        params: parameters, named parameters or groups of them; any real floating dtype and shape.
        lr: learning rate.
        betas: decay rates of Adam's two moments, in [0, 1); the first is :math:`\mu` too unless ``momentum`` is given.
        eps: the smallest divisor, at least 0: of Adam's step, and of a matrix's norm.
        nesterov: look ahead along the momentum.
        heavyball_momentum: sum gradients up rather than average them, see :class:`hb_muon.rules.MuonMomentum`.
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
