"""LATHER: Adam in the eigenbasis of PSGD's preconditioner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hb_psgd import kron
from hb_psgd.held import slots_of
from hb_psgd.psgd import FACTORS, KronOptimizer
from hb_psgd.rule import KronFactors
from hbcore.api import Context, HyperparameterError, Route, ScaleByAdam, Slot, State, Transform, bases


@dataclass(frozen=True)
class AdamInEigenbasis(KronFactors):
    r"""An elementwise rule in the eigenbases of a Kronecker preconditioner, by default Adam.

    .. math::
        u = B_0 \operatorname{inner}(B_0^\top G B_1)\, B_1^\top \qquad
        B_i \leftarrow \operatorname{QR}(Q_i^\top Q_i B_i) \text{ when a refresh is due, after Q's}

    The first gradient starts and fits the factors and gives the eigenvectors of :math:`Q_i^\top Q_i`, and moves nothing. A
    refresh comes after the update, as in :class:`hb_soap.rule.PreconditionBySOAP`: it rotates first moments into the new basis,
    and each column stays in its place, so that second moments stay with it.

    Args:
        inner: the rule; the ``basis`` of its slots tells how a refresh changes them.

    The others are those of :class:`KronFactors`. Slots: those of ``inner``, of the factors, and ``B_i``, ``[n, n]``, for each
    dense one.
    """

    inner: Transform = field(default_factory=ScaleByAdam)
    name = "lather"
    primes = True

    def takes(self, param: Tensor) -> bool:
        """Whether a parameter has a dense factor."""
        return any(any(self.dense(block.shape)) for block in self.blocks(param.shape))

    def slots(self, param: Tensor) -> dict[str, Slot]:
        own = super().slots(param)
        square = {f"B_{name[2:]}": slot for name, slot in own.items() if name.startswith("Q_") and len(slot.shape) == 2}
        return {**self.inner.slots(param), **own, **square}

    def prime(self, u: Tensor, s: State, c: Context) -> dict[str, Tensor]:
        [(held, begun)] = self.started([(u, s, c)])
        [fresh] = self.refreshed([(u, held, c)])
        columns = {f"B_{i}": bases.eigenbasis(kron.gram(q, c.products)) for i, q in enumerate(fresh.q) if q.ndim == 3}
        return {**begun, **slots_of(fresh), **columns}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        [result] = self.update_stacks([(u, s, c)])
        return result

    def update_stacks(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for (u, s, c), (_, _, new) in zip(stacks, self.advanced(stacks), strict=True):
            columns = [s.get(f"B_{i}") for i in range(u.ndim - 1)]
            direction, moved = c.apply(self.inner, bases.project(u, columns, c.products), s)
            yield bases.project_back(direction, columns, c.products), {**new, **moved}

    def refresh(self, stacks: Sequence[tuple[State, Context]]) -> Iterator[dict[str, Tensor]]:
        where = [(k, name[2:]) for k, (s, _) in enumerate(stacks) for name in s if name.startswith("B_")]
        pairs = [(kron.gram(stacks[k][0][f"Q_{i}"], stacks[k][1].products), stacks[k][0][f"B_{i}"]) for k, i in where]
        turned = dict(zip(where, bases.all_refreshed(pairs, stacks[0][1].products), strict=True))
        for k, (s, c) in enumerate(stacks):
            fresh = {int(i): b for (stack, i), b in turned.items() if stack == k}
            rotations = {i: c.products.finest.matmul(s[f"B_{i}"].mT, b) for i, b in fresh.items()}
            first = [name for name, slot in self.inner.slots(torch.empty(())).items() if slot.basis == "rotate"]
            moved = {n: bases.project(s[n], [rotations.get(i) for i in range(s[n].ndim - 1)], c.products) for n in first}
            yield {f"B_{i}": b for i, b in fresh.items()} | moved


class LATHER(KronOptimizer):
    r"""Adam in the eigenbasis of PSGD's Kronecker preconditioner (HeavyBall 3: Lie-group Adam Through Harmonic Eigenbasis
    Rotations).

    .. math::
        p_t = p_{t-1} - \mathrm{lr}\, B_0 \operatorname{Adam}(B_0^\top G B_1)\, B_1^\top

    where :math:`B_i` follows the eigenvectors of :math:`Q_i^\top Q_i`, and :math:`Q` is fitted to whiten the gradient as in
    :class:`hb_psgd.PSGDKron`; :class:`AdamInEigenbasis` has the rest. The first gradient prepares the bases and moves no
    matrix. Parameters without a dense factor are updated by Adam from the first step on.

    Args:
        betas: decay rates of Adam's two moments, in [0, 1).
        beta: another spelling of ``betas[0]``.
        eps: the smallest divisor, at least 0.
        momentum_into_precond_update: HeavyBall's, changes nothing: the factors are fitted to the gradient.

    The others are those of :class:`hb_psgd.PSGDKron`, and mean the same.

    State: ``exp_avg`` and ``exp_avg_sq``, in the bases; for each dimension ``Q_i`` and ``L_i``, for each dense one ``B_i``;
    ``init_scale`` and ``step``.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    beta: float | None = None
    eps: float = 1e-8

    def normalise(self, h: dict[str, Any]) -> dict[str, Any]:
        h = super().normalise(h)
        beta, betas = h.pop("beta"), h["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise HyperparameterError(f"betas={betas!r} is not two numbers; pass the decay rates of Adam's moments.")
        return h if beta is None else {**h, "betas": (beta, betas[1])}

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        adam = ScaleByAdam(h.betas, h.eps)
        lather = AdamInEigenbasis(inner=adam, cached=False, **{name: getattr(h, name) for name in FACTORS})
        return (Route(lather.takes, (lather,), (adam,)),)
