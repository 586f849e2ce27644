"""Muon, Jordan et al. 2024."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from hb_muon.orthogonalize import Coefficients
from hb_muon.routing import routing
from hb_muon.rules import MuonMomentum, as_data, orthogonalizer
from hb_muon.torch_form import from_torch, to_torch
from hbcore.api import Counterpart, Optimizer, Route, ScaleByAdam, Transform, is_matrix


class Muon(Optimizer):
    r"""Momentum, orthogonalized: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.

    .. math::
        b_t = \mu b_{t-1} + (1 - \mu) g_t \qquad u_t = (1 - \mu) g_t + \mu b_t \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(s \cdot \mathrm{orthogonalize}(u_t) + \lambda p_{t-1}\right)

    for each matrix, where :math:`u_t = b_t` without Nesterov's momentum, and :math:`s` is a scale that depends on the matrix's
    shape: see :class:`hb_muon.rules.Orthogonalize`. Parameters with fewer than two dimensions larger than 1 take Adam's step.
    Embeddings and the last layer are matrices too: the author leaves them to AdamW, see :class:`hb_muon.MuonAdamW`.

    Args:
        params: of any real floating dtype and shape.
        lr: learning rate.
        betas: decay rates of Adam's two moments, in [0, 1); the first is :math:`\mu` too unless ``momentum`` is given.
        eps: the smallest divisor, at least 0: of Adam's step, and of a matrix's norm.
        nesterov: look ahead along the momentum.
        heavyball_momentum: sum gradients up rather than average them, see :class:`hb_muon.rules.MuonMomentum`.
        momentum: :math:`\mu`, in [0, 1); None for ``betas[0]``, and any schedule of it.
        beta: another spelling of ``momentum``, which it overrides.
        method: ``"newton_schulz"``, ``"gram_newton_schulz"`` (fewer operations for matrices that are not square), ``"minimax"``
            (a closer initial bound and four steps; small matrices in float16), ``"exact"`` (a singular value decomposition), or
            ``"auto"``: the fastest on the device, ``"minimax"`` on GPUs and ``"newton_schulz"`` elsewhere; always the
            latter if ``ns_coefficients`` or ``ns_dtype`` is given.
        ns_steps: steps of the iteration, from 1 to 99; None for the method's own number, 5 or 4.
        ns_coefficients: ``"jordan"``, ``"you"``, ``"polar_express"``, three numbers for all steps, or three for each step;
            None for the method's own: those of ``"you"``, or a variant of ``"polar_express"`` for ``"gram_newton_schulz"``.
            torch.optim.Muon's are ``"jordan"``.
        ns_dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``, the dtype of the iteration; None for the method's own,
            bfloat16 or, for ``"gram_newton_schulz"``, float16. float64 parameters iterate in float64.
        scale_mode: ``"none"``, ``"scale"`` or ``"graft"``.
        adjust_lr_fn: ``"original"`` or ``"match_rms_adamw"``, which replaces ``scale_mode``.
        flatten: treat a convolution ``(o, i, h, w)`` as one matrix ``(o, i h w)``; False treats the last two dimensions of
            any such weight as matrices, and those before them as a batch, as for experts ``(e, o, i)``.
        split_sizes: the numbers of rows of the matrices that a weight consists of, ``(d, d, d)`` for a fused q, k, v of
            ``(3 d, d)``; set it for the param group of such weights, whose rows it must add up to.
        weight_decay: :math:`\lambda`.

    State: ``momentum_buffer``, or ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    nesterov: bool = True
    heavyball_momentum: bool = False
    momentum: float | None = None
    beta: float | None = None
    method: str = "auto"
    ns_steps: int | None = None
    ns_coefficients: Coefficients = None
    ns_dtype: str | torch.dtype | None = None
    scale_mode: str = "scale"
    adjust_lr_fn: str | None = None
    flatten: bool = True
    split_sizes: Sequence[int] | None = None

    counterpart: ClassVar[Counterpart | None] = Counterpart(
        "Muon", {"heavyball_momentum": False}, reads=from_torch, writes=to_torch
    )

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        beta = h.pop("beta")
        return as_data(h if beta is None else {**h, "momentum": beta})

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        # None is structure, not a number: such a group's momentum follows betas[0] through every schedule.
        momentum = MuonMomentum(h.betas[0] if h.momentum is None else h.momentum, h.nesterov, h.heavyball_momentum)
        orthogonal = orthogonalizer(h, h.scale_mode, h.adjust_lr_fn)
        return (Route(is_matrix, (momentum, orthogonal), (ScaleByAdam(h.betas, h.eps),)),)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self._routing()}"

    def _routing(self) -> str:
        """Which parameters are orthogonalized, in two lines."""
        return routing(self.param_groups, lambda _, p: is_matrix(p), "Muon", "Adam")
