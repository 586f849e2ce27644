"""MuonLaProp: LaProp's update, orthogonalized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hb_muon.orthogonalize import Coefficients
from hb_muon.rules import as_data, orthogonalizer
from hbcore.api import Optimizer, Route, ScaleByLaProp, Transform, is_matrix


class MuonLaProp(Optimizer):
    r"""LaProp (arXiv:2002.04839), whose update is orthogonalized as Muon's momentum is; HeavyBall's rule, without a paper.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\max(\sqrt{v_t / (1 - \beta_2^t)}, \epsilon)} \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(s \cdot \mathrm{orthogonalize}(m_t) + \lambda p_{t-1}\right)

    for each matrix, with Adam's second moment :math:`v_t`, and a scale :math:`s` that depends on the matrix's shape: see
    :class:`hb_muon.rules.Orthogonalize`. Parameters with fewer than two dimensions larger than 1 take LaProp's step,
    :math:`m_t / (1 - \beta_1^t)`.

    Args:
        params: of any real floating dtype and shape.
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: the smallest divisor, at least 0: of an element, and of a matrix's norm.
        method, ns_steps, ns_coefficients, ns_dtype, scale_mode, adjust_lr_fn, flatten, split_sizes: as in
            :class:`hb_muon.Muon`.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, of the parameter's shape, and ``step``.
    """

    lr: float = 0.0025
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    method: str = "auto"
    ns_steps: int | None = None
    ns_coefficients: Coefficients = None
    ns_dtype: str | torch.dtype | None = None
    scale_mode: str = "scale"
    adjust_lr_fn: str | None = None
    flatten: bool = True
    split_sizes: Sequence[int] | None = None

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        return as_data(h)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (ScaleByLaProp(h.betas, h.eps), Route(is_matrix, (orthogonalizer(h, h.scale_mode, h.adjust_lr_fn),)))
