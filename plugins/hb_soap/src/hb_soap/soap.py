"""SOAP, Vyas et al. 2024: an elementwise rule in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hb_soap.basis import Bases, eigenbasis, outer, permuted, project, project_back, refreshed
from hbcore.api import (
    Block,
    Context,
    Domain,
    HyperparameterError,
    Optimizer,
    OptionError,
    Route,
    ScaleByAdam,
    Slot,
    State,
    Transform,
    check_whole,
    ema,
    hyper,
    matrix_view,
)


@dataclass(frozen=True)
class PreconditionBySOAP(Transform):
    r"""SOAP's direction, Vyas et al. 2024 (arXiv:2409.11321), Algorithm 3, in the order of the authors' code.

    .. math::
        u = Q_0 \operatorname{inner}(Q_0^\top G Q_1)\,Q_1^\top \qquad
        P_i \leftarrow \beta P_i + (1 - \beta)\,G_{(i)} G_{(i)}^\top \qquad
        Q_i \leftarrow \operatorname{QR}(P_i Q_i) \text{ when a refresh is due}

    :math:`G_{(i)}` is the gradient unfolded along dimension :math:`i`. The first gradient gives :math:`P_i` and, by ``eigh``,
    :math:`Q_i`, and moves nothing, so that no gradient is projected into a basis computed from it. A refresh comes after the
    update: it rotates the inner rule's first moments into the new basis and permutes its second moments like the columns.

    Args:
        inner: the elementwise rule; the ``basis`` of its slots determines how a refresh changes them.
        shampoo_beta: :math:`\beta`.
        precondition_frequency: the number of steps from one refresh to the next, at least 1.
        max_precond_dim: larger dimensions, and those of size 1, get no factor.
        merge_dims: join dimensions after the first while their product is at most ``max_precond_dim``, or at most this number.
        precondition_1d: vectors get a factor too.
        use_precond_schedule: refresh less and less often instead; with ``(a, b)`` of ``precond_scheduler``, step ``t`` has the
            rate :math:`1 / (1 + \log_{10}(t^a)^b)`.
        split: False; True is not supported yet.

    Slots: those of ``inner``; ``GG_i`` (:math:`P_i`) and ``Q_i``, ``[n_i, n_i]``, for each preconditioned dimension.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: ``split`` is not False.
    """

    inner: Transform = field(default_factory=ScaleByAdam)
    shampoo_beta: float = hyper(0.95, ge=0, lt=1)
    precondition_frequency: int = 2
    max_precond_dim: int = 2048
    merge_dims: bool | int = True
    precondition_1d: bool = False
    use_precond_schedule: bool = False
    precond_scheduler: tuple[float, float] = (1 / 3, 9)
    split: bool = False
    name = "soap"
    domain = Domain.MATRIX
    primes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("precondition_frequency", self.precondition_frequency, 1)
        check_whole("max_precond_dim", self.max_precond_dim, 1)
        if not isinstance(self.merge_dims, bool):
            check_whole("merge_dims", self.merge_dims, 1)
        pair: Any = self.precond_scheduler
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_exponent, pair)):
            raise HyperparameterError(f"precond_scheduler={pair!r} is not two finite numbers from 0 on; pass (a, b).")
        if self.split is not False:
            raise OptionError(f"split={self.split!r} is not supported yet; pass split=False.")

    def takes(self, param: Tensor) -> bool:
        """Whether a parameter has a dimension to precondition. Vectors have one with ``precondition_1d`` only."""
        shapes = [block.shape for block in self.blocks(param.shape)]
        return (param.ndim > 1 or self.precondition_1d) and any(self._factors(shape) for shape in shapes)

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return matrix_view(shape, merge_dims=self.max_precond_dim if self.merge_dims is True else self.merge_dims)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        factors = self._factors(param.shape)
        square = {i: Slot(torch.Size((n, n)), exact=True) for i, n in factors.items()}
        own = {f"GG_{i}": slot for i, slot in square.items()} | {f"Q_{i}": slot for i, slot in square.items()}
        return {**self.inner.slots(param), **own}

    def scalars(self) -> dict[str, float]:
        return self.inner.scalars()

    def rate(self, k: int) -> float:
        if not self.use_precond_schedule:
            return 1 / self.precondition_frequency
        a, b = self.precond_scheduler
        return float(1 / (1 + math.log10(k**a) ** b))

    def prime(self, u: Tensor, s: State, c: Context) -> dict[str, Tensor]:
        new = {}
        for i in self._factors(u.shape[1:]):
            new[f"GG_{i}"] = (1 - self.shampoo_beta) * outer(u, i)
            new[f"Q_{i}"] = eigenbasis(new[f"GG_{i}"])
        return new

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        bases = [s.get(f"Q_{i}") for i in range(u.ndim - 1)]
        direction, new = c.apply(self.inner, project(u, bases), s)
        factors = {f"GG_{i}": ema(s[f"GG_{i}"], outer(u, i), self.shampoo_beta) for i in self._factors(u.shape[1:])}
        new = {**new, **factors}
        if c.refresh:
            new |= self._refresh(u, bases, new)
        return project_back(direction, bases), new

    def _refresh(self, u: Tensor, old: Bases, s: State) -> dict[str, Tensor]:
        """New bases for the factors in ``s``, and the slots of ``inner`` in them."""
        fresh, orders = list(old), list(old)
        for i, q in enumerate(old):
            if q is not None:
                fresh[i], orders[i] = refreshed(s[f"GG_{i}"], q)
        new = {f"Q_{i}": q for i, q in enumerate(fresh) if q is not None}
        for name, slot in self.inner.slots(u[0]).items():
            if slot.basis == "rotate":
                new[name] = project(project_back(s[name], old), fresh)
            elif slot.basis == "permute":
                new[name] = permuted(s[name], orders)
        return new

    def _factors(self, shape: tuple[int, ...]) -> dict[int, int]:
        """The dimensions of a block that get a factor, and their sizes."""
        return {i: n for i, n in enumerate(shape) if 1 < n <= self.max_precond_dim}


def _is_exponent(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) < math.inf


class SOAP(Optimizer):
    r"""Adam in the eigenbasis of Shampoo's preconditioner, Vyas et al. 2024 (arXiv:2409.11321), Algorithm 3.

    .. math::
        G' = Q_0^\top G Q_1 \qquad
        p_t = p_{t-1} - \mathrm{lr} \left(Q_0 \operatorname{Adam}(G')\,Q_1^\top + \lambda p_{t-1}\right) \qquad
        P_0 = \mathrm{EMA}(G G^\top),\; P_1 = \mathrm{EMA}(G^\top G)

    where :math:`Q_i` follows the eigenvectors of :math:`P_i`. The first step prepares the bases and moves no matrix. Vectors,
    scalars, and parameters without a dimension between 2 and ``max_precond_dim``, are updated by Adam from the first step on.

    Args:
        lr: learning rate.
        betas: decay rates of Adam's two moments, in [0, 1).
        shampoo_beta: decay rate of :math:`P_i`, in [0, 1); None means ``betas[1]``, as -1 does in the authors' code.
        eps: the smallest divisor, at least 0.
        precondition_frequency: the number of steps from one refresh of the bases to the next, at least 1.
        max_precond_dim: larger dimensions are not preconditioned.
        merge_dims: join dimensions after the first while their product is at most ``max_precond_dim``, or this number.
        precondition_1d: precondition vectors as well.
        use_precond_schedule: refresh the bases less and less often, and ignore ``precondition_frequency``.
        precond_scheduler: ``(a, b)`` of that schedule, :math:`1 / (1 + \log_{10}(t^a)^b)` refreshes at step ``t``.
        split: False; True is not supported yet.
        weight_decay: :math:`\lambda`.

    State: ``exp_avg`` and ``exp_avg_sq``, in the bases; for each preconditioned dimension ``GG_i`` and ``Q_i``; ``step``.
    """

    lr: float = 0.003
    betas: tuple[float, float] = (0.9, 0.95)
    shampoo_beta: float | None = 0.95
    eps: float = 1e-8
    precondition_frequency: int = 2
    max_precond_dim: int = 2048
    merge_dims: bool | int = True
    precondition_1d: bool = False
    use_precond_schedule: bool = False
    precond_scheduler: tuple[float, float] = (1 / 3, 9)
    split: bool = False
    weight_decay = 0.01

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        adam = ScaleByAdam(h.betas, h.eps)
        soap = PreconditionBySOAP(
            inner=adam,
            shampoo_beta=h.betas[1] if h.shampoo_beta is None else h.shampoo_beta,
            precondition_frequency=h.precondition_frequency,
            max_precond_dim=h.max_precond_dim,
            merge_dims=h.merge_dims,
            precondition_1d=h.precondition_1d,
            use_precond_schedule=h.use_precond_schedule,
            precond_scheduler=h.precond_scheduler,
            split=h.split,
        )
        return (Route(soap.takes, (soap,), (adam,)),)
