"""Eigenbases of a block's second moments, one for each dimension, and changes of basis: what SOAP and LATHER share.

Everything works on stacks: blocks ``[B, *shape]``, and for dimension ``i`` of a block either ``[B, n_i, n_i]`` or None, which
keeps that dimension unchanged. Pure functions; results have the dtype of the arguments. ``products`` is a rule's
``c.products``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hbcore.rules.launching import has_triton
from hbcore.rules.products import IEEE, Operand, Products, Weights, whole

Bases = Sequence["Tensor | None"]

PASSES = 3
"""Passes of :func:`cholesky_qr`. In float32, at 256 columns, two leave 5e-1 of a basis of gradients of rank 4; three 2e-5."""

BLOCK = 128
"""The largest side that is factorized at once, by the kernel of :mod:`hbcore.rules.factor_kernel`, which takes no more, or by
torch's library. Larger factors are made of such by products."""

TOGETHER = 2**26
"""How many elements of factors are orthonormalized at once, which bounds the memory for intermediate results."""

CHUNK = 2**24
"""How many of them are multiplied at once. Factorizations take as long for one matrix as for many; products do not."""


def project(x: Operand, bases: Bases, products: Products = IEEE, out: Tensor | None = None) -> Tensor:
    r"""Into the bases: :math:`Q_0^\top X Q_1` for a matrix, and the same along every dimension of any block.

    Args:
        x: ``[B, *shape]``; perhaps prepared by ``products``.
        bases: for each dimension of ``shape``, ``[B, n_i, n_i]`` or None; the columns are the basis.
        products: how to multiply.
        out: memory for the result, contiguous, which need not be used; not ``x``'s.
    """
    last = max((i for i, q in enumerate(bases) if q is not None), default=None)
    for i, q in enumerate(bases):
        x = x if q is None else along(x, q, i, products, out if i == last else None)
    return whole(x)


def project_back(x: Tensor, bases: Bases, products: Products = IEEE, out: Tensor | None = None) -> Tensor:
    r"""Out of the bases, :math:`Q_0 X Q_1^\top`: undoes :func:`project`."""
    return project(x, [q if q is None else q.mT for q in bases], products, out)


def along(
    x: Operand, q: Tensor, dim: int, products: Products = IEEE, out: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """``x`` times ``q`` ``[B, n, k]`` along dimension ``dim`` of its blocks.

    Args:
        out: :func:`project`'s; memory of neither factor, unless ``products.overwrites``.
        other: for blocks that are matrices, ``[B, m]`` numbers by which their other dimension is multiplied.
    """
    if x.ndim == 3:  # matrices, the usual case
        weights = None if other is None else Weights(other, columns=dim == 0)
        return products.matmul(x, q, out, weights) if dim else products.matmul(q.mT, x, out, weights)
    before, after = math.prod(x.shape[1 : dim + 1]), math.prod(x.shape[dim + 2 :])
    count, n, k = q.shape
    if before == 1:
        product = products.matmul(q.mT, x.reshape(count, n, after), None if out is None else out.view(count, k, after))
    elif after == 1:
        product = products.matmul(x.reshape(count, before, n), q, None if out is None else out.view(count, before, k))
    else:
        moved = whole(x).reshape(count, before, n, after).transpose(2, 3).reshape(count, before * after, n)
        product = products.matmul(moved, q).view(count, before, after, k).transpose(2, 3)
    return product.reshape(*x.shape[: dim + 1], k, *x.shape[dim + 2 :])


def averaged(mean: Tensor, x: Operand, dim: int, decay: float, products: Products = IEEE, out: Tensor | None = None) -> Tensor:
    r"""A running second moment of a dimension, :math:`\beta P + (1 - \beta)\,G G^\top` with that dimension's unfolding ``G``.

    Args:
        mean: :math:`P`, ``[B, n, n]``.
        x: ``[B, *shape]``; perhaps prepared by ``products``.
        dim: a dimension of ``shape``, from 0.
        decay: :math:`\beta`.
        products: how to multiply.
        out: memory for the result, contiguous, perhaps ``mean``'s, which need not be used.

    Returns:
        ``[B, n, n]``; what overflows is left out, see :meth:`~hbcore.rules.products.Products.averaged`.
    """
    if x.ndim == 3:  # matrices, the usual case
        return products.averaged(mean, x.mT if dim else x, decay, out)
    count, n = x.shape[0], x.shape[dim + 1]
    if math.prod(x.shape[dim + 2 :]) == 1:
        return products.averaged(mean, x.reshape(count, -1, n).mT, decay, out)
    rows = x.reshape(count, n, -1) if dim == 0 else whole(x).movedim(dim + 1, 1).reshape(count, n, -1)
    return products.averaged(mean, rows, decay, out)


def eigenvalues(p: Tensor, q: Tensor, products: Products = IEEE) -> Tensor:
    r"""The diagonal of :math:`Q^\top P Q`, ``[B, n]``: the eigenvalues of ``p``, if ``q`` is its eigenbasis."""
    return (q * products.matmul(p, q)).sum(-2)


def eigenbasis(p: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices ``[B, n, n]`` as columns, largest eigenvalue first.

    Zero gives the unit vectors. So does a matrix that is not finite, on which the solver would raise. Where the solver fails
    it runs again in float64. It raises; or it returns NaN, as LAPACK's does for some finite matrices with many rows of zeros.
    """
    p = torch.where(_finite(p), p, 0.0)
    try:
        vectors: Tensor = torch.linalg.eigh(p)[1]
        failed = ~_finite(vectors).flatten()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        vectors, failed = torch.empty_like(p), torch.ones(len(p), dtype=torch.bool, device=p.device)
    if failed.any():  # the solver has waited for the device anyway
        again = torch.linalg.eigh(p[failed].double())[1]
        unit = torch.eye(p.shape[-1], dtype=again.dtype, device=p.device)
        vectors[failed] = torch.where(_finite(again), again, unit).to(p.dtype)
    return vectors.flip(-1)


def _finite(p: Tensor) -> Tensor:
    """Which of the matrices are finite, ``[B, 1, 1]``."""
    return p.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def refreshed(p: Tensor, q: Tensor, products: Products = IEEE, solver: str = "qr") -> Tensor:
    r"""The basis that follows ``q`` for the second moments ``p``.

    ``"qr"`` takes one step of power iteration towards the eigenvectors, Vyas et al. 2024 (arXiv:2409.11321), Algorithm 4, with
    the sorting of the authors' code:

    .. math::
        \pi = \operatorname{argsort}(-\operatorname{diag}(Q^\top P Q)) \qquad Q'_{:, \pi} = \operatorname{QR}((P Q)_{:, \pi})

    Each column stays where it was: what is stored along with it needs no sorting. ``P`` is first shifted by 8 rounding errors
    of its largest eigenvalue. Directions in its null space then stay unchanged instead of becoming noise; a larger shift would
    slow the directions of small eigenvalues too. ``"eigh"`` takes the eigenvectors themselves, and assigns them in the order
    of the eigenvalues. It waits for the device.

    Args:
        p: symmetric, positive semidefinite, ``[B, n, n]``.
        q: orthonormal columns, ``[B, n, n]``.
        products: how to multiply.
        solver: ``"qr"`` or ``"eigh"``.

    Returns:
        The new basis; the old one for matrices where it cannot be computed, because ``p`` is not finite.
    """
    return all_refreshed([(p, q)], products, solver)[0]


def all_refreshed(factors: Sequence[tuple[Tensor, Tensor]], products: Products = IEEE, solver: str = "qr") -> list[Tensor]:
    """:func:`refreshed` for several stacks ``(p, q)``: those of one size and dtype at once, up to :data:`TOGETHER`."""
    fresh: list[Tensor | None] = [None] * len(factors)
    alike: dict[tuple[int, torch.dtype], list[tuple[int, int]]] = {}
    for k, (_, q) in enumerate(factors):
        alike.setdefault((q.shape[-1], q.dtype), []).extend((k, row) for row in range(len(q)))
    for (n, _), rows in alike.items():
        some = max(1, TOGETHER // n**2)
        some = -(-len(rows) // -(-len(rows) // some))  # as many chunks, of equal length
        for first in range(0, len(rows), some):
            for (k, part), made in _together(factors, _runs(rows[first : first + some]), products, solver):
                whole = fresh[k]
                if whole is None:
                    whole = fresh[k] = torch.empty_like(factors[k][1])
                whole[part] = made
    return [torch.empty_like(q) if made is None else made for made, (_, q) in zip(fresh, factors, strict=True)]


def _together(
    factors: Sequence[tuple[Tensor, Tensor]], pieces: Sequence[tuple[int, slice]], products: Products, solver: str
) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """:func:`refreshed` for rows of several stacks of one size, piece by piece of them."""
    count, n = sum(part.stop - part.start for _, part in pieces), factors[pieces[0][0]][1].shape[-1]
    like = factors[pieces[0][0]][1]
    made, good = like.new_empty(count, n, n), torch.ones(count, dtype=torch.bool, device=like.device)
    spans, orders, done = [], [], 0
    for k, part in pieces:
        spans.append(slice(done, done := done + part.stop - part.start))
        p, q = (side[part] for side in factors[k])
        image, order = _image(p, q, products)
        orders.append(order)
        if solver == "eigh":
            made[spans[-1]], good[spans[-1]] = eigenbasis(p), p.isfinite().all(-1).all(-1)
        else:
            torch.gather(image, -1, order.unsqueeze(-2).expand_as(q), out=made[spans[-1]])
        del image
    if solver == "qr":
        made, good = orthonormal(made, products)
    for (k, part), span, order in zip(pieces, spans, orders, strict=True):
        old = factors[k][1][part]
        fresh = torch.empty_like(old).scatter_(-1, order.unsqueeze(-2).expand_as(old), made[span])
        yield (k, part), torch.where(good[span, None, None], fresh, old)


def _image(p: Tensor, q: Tensor, products: Products) -> tuple[Tensor, Tensor]:
    """The shifted image of a basis, and the order of its columns by eigenvalue."""
    image, info = products.matmul(p, q), torch.finfo(q.dtype)
    values = (q * image).sum(-2)
    image.div_(values.amax(-1)[:, None, None].clamp(min=info.tiny)).add_(q, alpha=8 * info.eps)
    return image, values.argsort(dim=-1, descending=True, stable=True)


def _runs(rows: Sequence[tuple[int, int]]) -> list[tuple[int, slice]]:
    """Rows ``(stack, row)`` in order, as slices of each stack."""
    found: dict[int, slice] = {}
    for k, row in rows:
        found[k] = slice(found[k].start if k in found else row, row + 1)
    return [*found.items()]


def orthonormal(y: Tensor, products: Products = IEEE) -> tuple[Tensor, Tensor]:
    """The orthonormal factor of QR up to signs: by the library on a CPU, elsewhere by :func:`cholesky_qr`.

    Args:
        y: ``[B, n, n]``, with a condition number up to about 1 / (8 rounding errors); overwritten.
        products: how to multiply.

    Returns:
        The factor, and ``[B]`` booleans: whether it could be computed. Where it could not it is undefined.
    """
    if y.device.type != "cpu":
        return cholesky_qr(y, products)
    q: Tensor = torch.linalg.qr(y)[0]
    return q, q.isfinite().all(-1).all(-1)


def cholesky_qr(y: Tensor, products: Products = IEEE) -> tuple[Tensor, Tensor]:
    r""":func:`orthonormal` by matrix products only: batched, and without synchronising with the host.

    .. math:: R^\top R = Y^\top Y + n \epsilon I \qquad Y \leftarrow Y R^{-1} \quad\text{with its columns normalised}

    Shifted Cholesky QR, Fukaya et al. 2020 (arXiv:1809.11085). ``R`` is triangular, so the span of the first ``j`` columns
    does not change, however often this is repeated; QR has the same property.
    """
    info = torch.finfo(y.dtype)
    y /= y.norm(dim=-2, keepdim=True).clamp(min=info.tiny)
    good = torch.ones_like(y[:, 0, 0], dtype=torch.bool)
    some = max(1, CHUNK // y.shape[-1] ** 2)
    for _ in range(PASSES):
        square = torch.empty_like(y)
        for rows in (slice(i, i + some) for i in range(0, len(y), some)):
            square[rows] = products.squared(y[rows].mT)
        square.diagonal(dim1=-2, dim2=-1).add_(y.shape[-1] * info.eps)
        inverse, worked = inverse_factor(square)
        del square  # memory is short here
        for rows in (slice(i, i + some) for i in range(0, len(y), some)):
            y[rows] = products.matmul(y[rows], inverse[rows].mT)
        del inverse
        y /= y.norm(dim=-2, keepdim=True).clamp(min=info.tiny)
        good &= worked
    return y, good & y.isfinite().all(-1).all(-1)


def inverse_factor(p: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`L^{-1}` for :math:`L L^\top = P`, by halves, and where it exists.

    .. math::
        \begin{pmatrix} L_1 & \\ M & L_2 \end{pmatrix}^{-1} =
        \begin{pmatrix} L_1^{-1} & \\ -L_2^{-1} M L_1^{-1} & L_2^{-1} \end{pmatrix} \qquad
        M = P_{21} L_1^{-\top} \qquad L_2 L_2^\top = P_{22} - M M^\top

    A GPU multiplies matrices ten times as fast as its library factorizes them and solves with the factors.

    Args:
        p: symmetric, ``[B, n, n]``; the lower half is read, and ``p`` is overwritten.

    Returns:
        Lower triangular matrices ``[B, n, n]``, and ``[B]`` booleans. Where ``p`` is not positive definite they are undefined.
    """
    inverse, good = torch.zeros_like(p), torch.ones(len(p), dtype=torch.int32, device=p.device)
    _invert(p, inverse, good)
    return inverse, good > 0


def _invert(p: Tensor, inverse: Tensor, good: Tensor) -> None:
    n = p.shape[-1]
    if n <= BLOCK:
        if p.is_cuda and p.dtype == torch.float32 and has_triton():
            from hbcore.rules import factor_kernel  # Triton is slow to import, and not everywhere

            factor_kernel.inverse(p, inverse, good)
            return
        factor, failed = torch.linalg.cholesky_ex(p)
        eye = torch.eye(n, dtype=p.dtype, device=p.device).expand_as(p)
        inverse.copy_(torch.linalg.solve_triangular(factor, eye, upper=False))
        good.masked_fill_(failed != 0, 0)
        return
    h = -(-n // 2 // BLOCK) * BLOCK
    first, second, corner = inverse[:, :h, :h], inverse[:, h:, h:], inverse[:, h:, :h]
    _invert(p[:, :h, :h], first, good)
    m = torch.bmm(p[:, h:, :h], first.mT)
    p[:, h:, h:].baddbmm_(m, m.mT, alpha=-1)
    _invert(p[:, h:, h:], second, good)
    corner.baddbmm_(second, torch.bmm(m, first), beta=0, alpha=-1)
