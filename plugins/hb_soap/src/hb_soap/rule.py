"""The rule of the SOAP family: an elementwise rule in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hbcore.api import (
    Block,
    Context,
    Domain,
    HyperparameterError,
    Operand,
    OptionError,
    Route,
    ScaleByAdam,
    Slot,
    State,
    Transform,
    at_least,
    bases,
    check_whole,
    grid_view,
    hyper,
    matrix_view,
)

Covariance = Literal["plain", "kl", "kl_inverse"]
Solver = Literal["qr", "eigh"]


@dataclass(frozen=True)
class PreconditionBySOAP(Transform):
    r"""SOAP's direction, Vyas et al. 2024 (arXiv:2409.11321), Algorithm 3, in the order of the authors' code.

    .. math::
        u = Q_0 \operatorname{inner}(Q_0^\top G Q_1)\,Q_1^\top \qquad
        P_i \leftarrow \beta P_i + (1 - \beta)\,X_i X_i^\top \qquad
        Q_i \leftarrow \operatorname{QR}(P_i Q_i) \text{ when a refresh is due}

    :math:`X_i` is the gradient unfolded along dimension :math:`i`. The first gradient gives :math:`P_i` and, by ``eigh``,
    :math:`Q_i`, and moves nothing, so that no gradient is projected into a basis computed from it. A refresh comes after the
    update: it rotates the inner rule's first moments into the new basis. Second moments belong to the columns, which stay in
    their places, or are rotated with ``rotate_squares``:

    .. math:: R_i = Q_i^\top Q_i' \qquad m \leftarrow R_0^\top m R_1 \qquad v \leftarrow (R_0^{\circ 2})^\top v R_1^{\circ 2}

    With the eigenvalues :math:`d_i = \operatorname{diag}(Q_i^\top P_i Q_i) / (1 - \beta^t)`, KL-Shampoo and KL-SOAP, Lin et al.
    2025 (arXiv:2509.03378), average the gradient that the other dimensions have whitened,
    :math:`X_0 = G Q_1 \operatorname{diag}(n_1 d_1)^{-1/2}`, and KL-Shampoo multiplies the inner rule's result by
    :math:`\prod_i d_i^{-1/2}`.

    Args:
        inner: the elementwise rule; the ``basis`` of its slots determines how a refresh changes them.
        shampoo_beta: :math:`\beta`.
        eps: the smallest eigenvalue that the KL forms divide by.
        dampening: noise on the gradients that the KL forms average, :math:`(\delta + \epsilon_{32} |g|)\,n` with normal ``n``.
        init_factor: factors begin as this multiple of the identity instead of the first gradient's; None for that one.
        covariance: what the factors average: ``"plain"``, the gradient; ``"kl"``, the whitened one; ``"kl_inverse"``, the same
            without directions of no eigenvalue, instead of ``eps`` for it.
        whiten: multiply the inner rule's result by the inverse roots of the eigenvalues, and keep factors of equal size.
        rotate_squares: rotate second moments.
        solver: the new basis comes from one power iteration (``"qr"``) or an eigendecomposition (``"eigh"``).
        precondition_frequency: the number of steps from one refresh to the next, at least 1.
        max_precond_dim: larger dimensions, and those of size 1, get no factor.
        merge_dims: join dimensions after the first while their product is at most ``max_precond_dim``, or at most this number.
        split: cut dimensions into blocks of ``max_precond_dim`` rather than leave them without factor.
        precondition_1d: vectors get a factor too.
        use_precond_schedule: refresh less and less often instead; with ``(a, b)`` of ``precond_scheduler``, step ``t`` has the
            rate :math:`1 / (1 + \log_{10}(t^a)^b)`.
        stagger: refresh each matrix in a step of its own.

    Slots: those of ``inner``; ``GG_i`` (:math:`P_i`) and ``Q_i``, ``[n_i, n_i]``, for each preconditioned dimension.

    Raises:
        HyperparameterError: a hyperparameter is outside its bounds.
        OptionError: an option has a value that does not exist.
    """

    inner: Transform = field(default_factory=ScaleByAdam)
    shampoo_beta: float = hyper(0.95, ge=0, lt=1)
    eps: float = hyper(1e-8, ge=0)
    dampening: float = 0.0
    init_factor: float | None = None
    covariance: Covariance = "plain"
    whiten: bool = False
    rotate_squares: bool = False
    solver: Solver = "qr"
    precondition_frequency: int = 2
    max_precond_dim: int = 2048
    merge_dims: bool | int = True
    split: bool = False
    precondition_1d: bool = False
    use_precond_schedule: bool = False
    precond_scheduler: tuple[float, float] = (1 / 3, 9)
    stagger: bool = False
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
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(map(_is_number, pair)):
            raise HyperparameterError(f"precond_scheduler={pair!r} is not two finite numbers from 0 on; pass (a, b).")
        if self.init_factor is not None and not (_is_number(self.init_factor) and self.init_factor > 0):
            raise HyperparameterError(f"init_factor={self.init_factor!r} is not a finite number above 0.")
        if not _is_number(self.dampening):
            raise HyperparameterError(f"dampening={self.dampening!r} is not a finite number from 0 on.")
        for name in ("split", "stagger"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} is neither True nor False.")
        for name, choices in (("solver", get_args(Solver)), ("covariance", get_args(Covariance))):
            if getattr(self, name) not in choices:
                raise OptionError(f"{name}={getattr(self, name)!r} does not exist; pass one of {', '.join(choices)}.")

    def takes(self, param: Tensor) -> bool:
        """Whether a parameter has a dimension to precondition. Vectors have one with ``precondition_1d`` only."""
        shapes = [block.shape for block in self.blocks(param.shape)]
        return (param.ndim > 1 or self.precondition_1d) and any(self._factors(shape) for shape in shapes)

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        merge = self.max_precond_dim if self.merge_dims is True else self.merge_dims
        return grid_view(shape, self.max_precond_dim, merge) if self.split else matrix_view(shape, merge_dims=merge)

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

    @property
    def staggers(self) -> bool:
        return self.stagger

    def prime(self, u: Tensor, s: State, c: Context) -> dict[str, Tensor]:
        new = {}
        for i, n in self._factors(u.shape[1:]).items():
            if self.init_factor is None:
                new[f"GG_{i}"] = bases.averaged(torch.zeros_like(s[f"GG_{i}"]), u, i, float(self.shampoo_beta), c.products)
                new[f"Q_{i}"] = bases.eigenbasis(new[f"GG_{i}"])
            else:
                eye = torch.eye(n, dtype=u.dtype, device=u.device).expand(len(u), n, n)
                new[f"GG_{i}"], new[f"Q_{i}"] = (1 - self.shampoo_beta) * self.init_factor * eye, eye.clone()
        return new

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        columns = [s.get(f"Q_{i}") for i in range(u.ndim - 1)]
        values = self._eigenvalues(s, columns, c)
        gradient = u if values else c.products.prepared(u)
        projected = bases.project(gradient, columns, c.products)
        averages = self._averaged(gradient, s, columns, values, c)
        del gradient  # memory is short here
        direction, new = c.apply(self.inner, projected, s)
        del projected
        if self.whiten:
            for i, d in values.items():
                direction = direction * _spread(at_least(d, self.eps).rsqrt(), i, u.ndim)
        return bases.project_back(direction, columns, c.products, c.into("update")), {**new, **averages}

    def refresh(self, stacks: Sequence[tuple[State, Context]]) -> Iterable[dict[str, Tensor]]:
        where = [(k, name.removeprefix("Q_")) for k, (s, _) in enumerate(stacks) for name in s if name.startswith("Q_")]
        factors = [(stacks[k][0][f"GG_{i}"], stacks[k][0][f"Q_{i}"]) for k, i in where]
        fresh = dict(zip(where, bases.all_refreshed(factors, stacks[0][1].products, self.solver), strict=True))
        del factors
        for k, (s, c) in enumerate(stacks):
            yield self._turned(s, {int(i): q for (of, i), q in fresh.items() if of == k}, c)

    def _turned(self, s: State, fresh: Mapping[int, Tensor], c: Context) -> dict[str, Tensor]:
        """New bases for one stack, and the slots of ``inner`` in them."""
        new = {f"Q_{i}": q for i, q in fresh.items()}
        # what a rotation leaks from a gradient's directions into those without one adds up, and Adam makes it as large
        rotations = {i: c.products.finest.matmul(s[f"Q_{i}"].mT, q) for i, q in fresh.items()}
        for name, slot in self.inner.slots(torch.empty(())).items():
            dims = range(s[name].ndim - 1)
            if slot.basis == "rotate":
                new[name] = bases.project(s[name], [rotations.get(i) for i in dims], c.products)
            elif slot.basis == "permute" and self.rotate_squares:
                squares = [rotations[i].square() if i in rotations else None for i in dims]
                most = torch.finfo(s[name].dtype).max / s[name][0].numel()  # an infinite moment would make others NaN
                new[name] = bases.project(s[name].clamp(max=most), squares, c.products).clamp(min=0)
        return new

    def _averaged(
        self, u: Operand, s: State, columns: bases.Bases, values: Mapping[int, Tensor], c: Context
    ) -> dict[str, Tensor]:
        """The factors with this gradient in their averages; ``u`` is a tensor where ``values`` whiten it."""
        if isinstance(u, Tensor) and self.covariance != "plain" and self.dampening:
            u = u + (self.dampening + torch.finfo(torch.float32).eps * u.abs()) * c.probe(u)
        new = {}
        for i in self._factors(u.shape[1:]):
            x = u
            for j, d in values.items():
                q = columns[j]
                if j != i and q is not None:
                    weight = self._inverse(d) / d.shape[-1]
                    x = bases.along(x, q, j, c.products) * _spread(weight.sqrt(), j, len(u.shape))
            name = f"GG_{i}"
            out = None if values else c.into(name)  # the eigenvalues of both are read before either changes
            new[name] = bases.averaged(s[name], x, i, float(self.shampoo_beta), c.products, out)
        return _balanced(new) if self.whiten else new

    def _inverse(self, d: Tensor) -> Tensor:
        if self.covariance == "kl_inverse":
            return torch.where(d > self.eps, 1 / d, 0.0)
        return 1 / at_least(d, self.eps)

    def _eigenvalues(self, s: State, columns: bases.Bases, c: Context) -> dict[int, Tensor]:
        """:math:`d_i` of the factors before this step, ``[B, n_i]``, where something divides by them."""
        if self.covariance == "plain" and not self.whiten:
            return {}
        known = 1 - self.shampoo_beta**c.step  # how much of the average is gradients
        found = ((i, q) for i, q in enumerate(columns) if q is not None)
        return {i: bases.eigenvalues(s[f"GG_{i}"], q, c.products) / known for i, q in found}

    def _factors(self, shape: tuple[int, ...]) -> dict[int, int]:
        """The dimensions of a block that get a factor, and their sizes."""
        return {i: n for i, n in enumerate(shape) if 1 < n <= self.max_precond_dim}


def preconditioned(inner: Transform, h: Any, alone: Transform | None = None, **how: Any) -> tuple[Transform, ...]:
    """SOAP's rule for what has a dimension to precondition, and an elementwise rule for everything else.

    Args:
        inner: the rule in the basis.
        h: the group's entries, those of :class:`hb_soap.SOAP` among them.
        alone: the elementwise rule; by default ``inner``.
        how: further fields of :class:`PreconditionBySOAP`.
    """
    soap = PreconditionBySOAP(
        inner=inner,
        shampoo_beta=h.betas[1] if h.shampoo_beta is None else h.shampoo_beta,
        eps=h.eps,
        solver=h.solver,
        precondition_frequency=h.precondition_frequency,
        max_precond_dim=h.max_precond_dim,
        merge_dims=h.merge_dims,
        split=h.split,
        precondition_1d=h.precondition_1d,
        use_precond_schedule=h.use_precond_schedule,
        precond_scheduler=h.precond_scheduler,
        stagger=h.stagger,
        **how,
    )
    return (Route(soap.takes, (soap,), (inner if alone is None else alone,)),)


def _balanced(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors of each block with largest elements of one size; their product does not change."""
    if len(factors) < 2:
        return factors
    logs = {
        name: p.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(p.dtype).tiny).log() for name, p in factors.items()
    }
    mean = sum(logs.values()) / len(logs)
    return {name: p * (mean - logs[name]).exp() for name, p in factors.items()}


def _spread(d: Tensor, dim: int, ndim: int) -> Tensor:
    """``[B, n]`` in the shape that multiplies dimension ``dim`` of blocks ``[B, *shape]`` of ``ndim`` dimensions."""
    return d.view(len(d), *(d.shape[1] if i == dim else 1 for i in range(ndim - 1)))


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) < math.inf
