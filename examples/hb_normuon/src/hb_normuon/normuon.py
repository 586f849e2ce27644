"""NorMuon, Li et al. 2025: Muon, whose rows have step sizes of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hb_muon import MuonMomentum, Orthogonalize
from hbcore.api import (
    Block,
    Context,
    Domain,
    Optimizer,
    Route,
    ScaleByAdam,
    Slot,
    State,
    Transform,
    ema,
    hyper,
    is_matrix,
    matrix_view,
)


@dataclass(frozen=True)
class NormaliseNeurons(Transform):
    r"""Divide each row of an update by the root of its running mean square; then scale the matrix to a mean square of 0.04.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \operatorname{mean}_j O_{t,j}^2 \qquad
        \hat O_t = \frac{O_t}{\sqrt{v_t} + \epsilon} \qquad
        u_t = \frac{0.2 \sqrt{m n}}{\|\hat O_t\|_F} \hat O_t

    for stacks of matrices ``[B, m, n]``, whose rows are neurons.

    Slots: ``row_sq``, one number for each row, as precise as the matrix is computed.
    """

    beta2: float = hyper(0.95, ge=0, lt=1, role="second_moment")
    eps: float = hyper(1e-8, ge=0)
    name = "normalise_neurons"
    domain = Domain.MATRIX

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return matrix_view(shape)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"row_sq": Slot(param.shape[:1], exact=True, nonnegative=True)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        row_sq = ema(s["row_sq"], u.square().mean(-1), self.beta2)
        rows = c.divide(u, row_sq.sqrt().unsqueeze(-1), self.eps)
        mean_square = rows.square().mean((-2, -1), keepdim=True)
        return 0.2 * torch.where(mean_square > 0, rows * mean_square.rsqrt(), 0.0), {"row_sq": row_sq}


class NorMuon(Optimizer):
    r"""NorMuon, Li et al. 2025, NorMuon: Making Muon more efficient and scalable (arXiv:2510.05491), Algorithm 1.

    The momentum is orthogonalised as in Muon, and each row of the factor divided by the root of its running mean square.
    Parameters with fewer than two dimensions larger than 1 take Adam's step. Embeddings and the last layer are matrices too:
    the authors leave them to AdamW, see :class:`hbcore.SplitOpt`.

    Args:
        lr: the learning rate; a matrix's step has a root mean square of 0.2, about AdamW's.
        betas: the decay rates of the momentum and of the rows' mean squares, in [0, 1).
        adam_betas: those of Adam's moments.
        eps: the least root to divide by.
        nesterov: look ahead along the momentum; the paper does not.
        method: how to orthogonalise, see :class:`hb_muon.Muon`.

    State: 4 bytes per parameter of a matrix in float32, and 4 for each row; 8 per parameter otherwise.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.95, 0.95)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    nesterov: bool = False
    method: str = "auto"

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        momentum = MuonMomentum(h.betas[0], h.nesterov)
        factor = Orthogonalize(h.eps, h.method, scale_mode="none")
        neurons = NormaliseNeurons(h.betas[1], h.eps)
        return (Route(is_matrix, (momentum, factor, neurons), (ScaleByAdam(h.adam_betas, h.eps),)),)
