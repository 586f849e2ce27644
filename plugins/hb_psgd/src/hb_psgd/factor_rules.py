r"""How the factors of one Kronecker preconditioner follow a gradient: interchangeable rules, by name in :data:`RULES`.

A rule first makes :class:`Evidence` of a block's dampened gradient :math:`\tilde g`, for each dimension: two matrices whose
difference is zero once :math:`P \tilde g` is white. Then it moves each factor by that difference, relative to a running bound
of its norm,

.. math:: \ell = \lVert T_1 + T_2 \rVert \qquad L \leftarrow \max(\beta L + (1 - \beta)\ell, \ell) \qquad s = \mathrm{lr} / L

With :math:`x = P \tilde g`, :math:`t = \mathrm{numel} / n` for a dimension i of size n, and the standard normal numbers v of
the dampening:

.. math::
    \text{pro:}\quad & T_1 = \langle x, x \rangle_i,\; T_2 = t I, &&
    Q \leftarrow \mathrm{procrustes}(Q - s (T_1 - T_2) Q) \\
    \text{quad:}\quad & \text{the same,} &&
    Q \leftarrow \mathrm{sym}\bigl((I - \tfrac s2 (T_1 - T_2))\, Q\, (I - \tfrac s2 (T_1 - T_2))\bigr) \\
    \text{qeq:}\quad & \text{the same,} && Q \leftarrow Q - s\, Q\, (T_1 - T_2) \\
    \text{qep:}\quad & T_1 = \langle Q_i x, Q_i x \rangle_i,\; T_2 = t\, Q_i Q_i^T, && Q \leftarrow Q - s (T_1 - T_2) Q \\
    \text{eq:}\quad & T_1 = \langle Q \tilde g, Q \tilde g \rangle_i,\; T_2 = \langle Q^{-T} v, Q^{-T} v \rangle_i, &&
    Q \leftarrow Q - s\, \mathrm{triu}(T_1 - T_2)\, Q

:math:`\langle x, x \rangle_i` sums over all dimensions but i. A diagonal factor moves by the diagonals of the same.

In Newton form :math:`\tilde g` is a Hessian-vector product Hv, dampened, and v its vector: then :math:`T_2` is
:math:`\langle v, v \rangle_i`, or for qep :math:`\langle Q_i v, Q_i v \rangle_i`, whose mean over v is whitening's.

Sources: Pooladzandi and Li 2024 (arXiv:2402.11858), and psgd_torch of October 2025, which calls them Q0.5EQ1.5 or PRO, QUAD,
QEQ, QEP and EQ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from hb_psgd.kron import Number, along, gram, has_kernels, multiply, per_block, second_moments, symmetric
from hb_psgd.norms import procrustes
from hbcore.api import Products, bases


class Evidence(NamedTuple):
    """What moves a factor ``[B, n, n]`` or ``[B, n]``: like it, or for ``second`` the same multiple of the identity."""

    first: Tensor
    second: Tensor | float


class Settings(NamedTuple):
    """How the factors are fitted.

    Attributes:
        lr: the factors' learning rate, in [0, 1].
        beta: the decay of the bound, in [0, 1).
        iterations: of :func:`hb_psgd.norms.norm_bound`.
        products: how to multiply.
    """

    lr: Number
    beta: Number
    iterations: int
    products: Products


class Factor(NamedTuple):
    """One factor of a stack of blocks.

    Attributes:
        q: ``[B, n, n]`` or ``[B, n]``.
        share: ``[B]``, the multiple of the identity that ``q`` starts as in this step; 0 in blocks that have started,
            None where none starts.
        bound: its running bound, ``[B]``.
        first, second: its evidence; ``second`` may also be ``[B]``, a multiple of the identity for each block.
        start: normal numbers ``[B, k, n]`` from which the norm's bound starts; empty for a diagonal.
    """

    q: Tensor
    share: Tensor | None
    bound: Tensor
    first: Tensor
    second: Tensor | float
    start: Tensor

    def rows(self, part: slice) -> Factor:
        """Some of its blocks."""
        second = self.second[part] if isinstance(self.second, Tensor) else self.second
        share = None if self.share is None else self.share[part]
        return Factor(self.q[part], share, self.bound[part], self.first[part], second, self.start[part])


Gather = Callable[[Tensor, Tensor, Sequence[Tensor], Callable[[Tensor], Tensor], Products], Iterator[Evidence]]
Move = Callable[[Factor, Tensor, Settings], Tensor]


@dataclass(frozen=True)
class FactorRule:
    """One of :data:`RULES`.

    Attributes:
        evidence: ``evidence(g, v, factors, precondition, products)`` for the dampened gradient ``g``, its noise ``v``, the
            factors of Q and a function that multiplies by P.
        newton: the same for a dampened Hessian-vector product and its vector, which P is to make alike.
        move: ``move(factor, step, settings)``, the new factor, perhaps in the memory of its evidence; ``step`` is ``[B]``.
        halves: how many parts of a step a diagonal factor takes, one after the other.
        reads_noise: whether ``evidence`` reads v.
        reads_factors: whether ``evidence`` and ``newton`` read the factors themselves, beside multiplying by P.
    """

    evidence: Gather
    newton: Gather
    move: Move
    halves: int = 1
    reads_noise: bool = False
    reads_factors: bool = False


def whiteness(
    g: Tensor, v: Tensor, factors: Sequence[Tensor], precondition: Callable[[Tensor], Tensor], products: Products
) -> Iterator[Evidence]:
    """Of the rules that compare :math:`Pg` with white noise."""
    pg = precondition(g)
    del g, v  # memory is short here
    several = sum(q.ndim == 3 for q in factors) > 1
    x = products.prepared(pg) if several else pg
    for i, q in enumerate(factors):
        yield Evidence(second_moments(x if q.ndim == 3 else pg, i, q.ndim == 3, products), pg[0].numel() / q.shape[-1])


def whiteness_by_factor(
    g: Tensor, v: Tensor, factors: Sequence[Tensor], precondition: Callable[[Tensor], Tensor], products: Products
) -> Iterator[Evidence]:
    """Of QEP: the same between :math:`Q_i` and its transpose."""
    pg = precondition(g)
    for i, q in enumerate(factors):
        level = pg[0].numel() / q.shape[-1]
        if q.ndim == 2:
            yield Evidence(second_moments(pg * along(q, i, pg), i, False, products), level * q * q)
        else:
            turned = bases.along(pg, q.mT, i, products)
            yield Evidence(second_moments(turned, i, True, products), level * gram(q.mT, products))


def likeness(
    h: Tensor, v: Tensor, factors: Sequence[Tensor], precondition: Callable[[Tensor], Tensor], products: Products
) -> Iterator[Evidence]:
    """Of the rules that compare :math:`Ph` with v."""
    ph = precondition(h)
    for i, q in enumerate(factors):
        yield Evidence(*(second_moments(x, i, q.ndim == 3, products) for x in (ph, v)))


def likeness_by_factor(
    h: Tensor, v: Tensor, factors: Sequence[Tensor], precondition: Callable[[Tensor], Tensor], products: Products
) -> Iterator[Evidence]:
    """Of QEP: the same between :math:`Q_i` and its transpose."""
    ph = precondition(h)
    for i, q in enumerate(factors):
        turned = (x * along(q, i, x) if q.ndim == 2 else bases.along(x, q.mT, i, products) for x in (ph, v))
        yield Evidence(*(second_moments(x, i, q.ndim == 3, products) for x in turned))


def inverse_pair(
    g: Tensor, v: Tensor, factors: Sequence[Tensor], precondition: Callable[[Tensor], Tensor], products: Products
) -> Iterator[Evidence]:
    """Of EQ, also in Newton form: :math:`Qg` and :math:`Q^{-T} v`, by triangular solves."""
    a, b = multiply(g, factors, products), v
    for i, q in enumerate(factors):
        b = b / along(q, i, b) if q.ndim == 2 else _solved(b, q, i)
    for i, q in enumerate(factors):
        yield Evidence(*(second_moments(x, i, q.ndim == 3, products) for x in (a, b)))


def _solved(x: Tensor, q: Tensor, i: int) -> Tensor:
    """``x`` times the inverse of the upper triangular ``q`` along dimension i."""
    rows = x.movedim(i + 1, -1)
    solved: Tensor = torch.linalg.solve_triangular(q, rows.reshape(len(x), -1, q.shape[-1]), upper=True, left=False)
    return solved.reshape(rows.shape).movedim(-1, i + 1).contiguous()


def by_procrustes(factor: Factor, step: Tensor, settings: Settings) -> Tensor:
    """PRO: from the left, and kept symmetric by rotations."""
    moved = from_the_left(factor, step, settings)
    return moved if moved.ndim == 2 else procrustes(moved, factor.start, settings.products, settings.iterations)


def from_the_left(factor: Factor, step: Tensor, settings: Settings) -> Tensor:
    r""":math:`Q - s (T_1 - T_2) Q`."""
    return _moved(factor, 1.0, step, settings.products.matmul)


def from_the_right(factor: Factor, step: Tensor, settings: Settings) -> Tensor:
    r"""QEQ: :math:`Q - s\, Q (T_1 - T_2)`."""
    return _moved(factor, 1.0, step, lambda t, q: settings.products.matmul(q, t))


def from_both_sides(factor: Factor, step: Tensor, settings: Settings) -> Tensor:
    """QUAD: half of it from each side, which keeps a symmetric factor symmetric and positive."""
    if factor.q.ndim == 2:
        return _moved_diagonal(factor, step, 2)
    first, second = factor.first, factor.second
    q = _moved(factor, 0.5, step, settings.products.matmul)
    if is_multiple(second) and has_kernels(q, first):
        from hb_psgd import fitting_kernel  # Triton is slow to import, and not everywhere

        made = settings.products.matmul(q, first, first if settings.products.overwrites else None)
        return fitting_kernel.moved(made, q, step, second, 0.5, mirrored=True)
    half = 0.5 * step
    by, keep = per_block(-half, q), torch.ones_like(half)
    if not is_multiple(second):
        t = first - second
    else:
        t, keep = first, 1 + half * second

    def part(rows: slice, columns: slice) -> Tensor:
        moved = settings.products.matmul(q[:, rows], t[:, :, columns]).mul_(by)
        return moved.addcmul_(q[:, rows, columns], per_block(keep, q))

    return symmetric(q, part)


def triangular(factor: Factor, step: Tensor, settings: Settings) -> Tensor:
    """EQ: by the upper triangle alone."""
    return _moved(factor, 1.0, step, lambda t, q: settings.products.matmul(t.triu(), q))


def _moved(factor: Factor, part: float, step: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The factor less ``part`` of ``step`` times its product with the evidence's difference; a diagonal's is elementwise."""
    q, first, second = factor.q, factor.first, factor.second
    if q.ndim == 2:
        return _moved_diagonal(factor, step, 1)
    if not is_multiple(second):
        return product(first - second, q).mul_(per_block(-part * step, q)).add_(q)
    made = product(first, q)
    if has_kernels(made, q):
        from hb_psgd import fitting_kernel

        return fitting_kernel.moved(made, q, step, second, part)
    step = part * step
    return made.mul_(per_block(-step, q)).addcmul_(q, per_block(1 + step * second, q))


def _moved_diagonal(factor: Factor, step: Tensor, halves: int) -> Tensor:
    """A diagonal after so many equal parts of a step, each :math:`1 - \\tfrac{s}{k} (T_1 - T_2)` times what was before."""
    second = factor.second
    difference = factor.first - (per_block(second, factor.first) if is_multiple(second) else second)
    by = torch.rsub(difference.mul_(per_block(step, difference)), 1, alpha=1 / halves)
    return (by if halves == 1 else by.square_()).mul_(factor.q)


def is_multiple(second: Tensor | float) -> TypeGuard[Tensor]:
    """Whether the second part of an evidence is a multiple of the identity for each block, ``[B]``."""
    return isinstance(second, Tensor) and second.ndim == 1


RULES: Mapping[str, FactorRule] = {
    "pro": FactorRule(whiteness, likeness, by_procrustes),
    "quad": FactorRule(whiteness, likeness, from_both_sides, halves=2),
    "eq": FactorRule(inverse_pair, inverse_pair, triangular, reads_noise=True, reads_factors=True),
    "qeq": FactorRule(whiteness, likeness, from_the_right),
    "qep": FactorRule(whiteness_by_factor, likeness_by_factor, from_the_left, reads_factors=True),
}
"""The rules by their names, the values of the option ``precond_rule``."""
