"""Eigenbases of a block's second moments, one for each dimension, and changes of basis.

Everything works on stacks: blocks ``[B, *shape]``, and for dimension ``i`` of a block either ``[B, n_i, n_i]`` or None, which
keeps that dimension unchanged. Pure functions; results have the dtype of the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Bases = Sequence["Tensor | None"]

PASSES = 4
"""Cholesky passes of :func:`orthonormal`: enough in float32 for 768 columns of a random basis and a condition number of 1e8."""


def project(x: Tensor, bases: Bases) -> Tensor:
    r"""Into the bases: :math:`Q_0^\top X Q_1` for a matrix, and the same along every dimension of any block.

    Args:
        x: ``[B, *shape]``.
        bases: for each dimension of ``shape``, ``[B, n_i, n_i]`` or None; the columns are the basis.
    """
    for i, q in enumerate(bases):
        x = x if q is None else _along(x, q, i)
    return x


def project_back(x: Tensor, bases: Bases) -> Tensor:
    r"""Out of the bases, :math:`Q_0 X Q_1^\top`: undoes :func:`project`."""
    return project(x, [q if q is None else q.mT for q in bases])


def permuted(x: Tensor, orders: Bases) -> Tensor:
    """Elements of ``x`` ``[B, *shape]`` in the order given by each dimension's permutation, ``[B, n_i]`` or None."""
    for i, order in enumerate(orders):
        if order is not None:
            shape = [n if d in (0, i + 1) else 1 for d, n in enumerate(x.shape)]
            x = x.gather(i + 1, order.view(shape).expand_as(x))
    return x


def outer(x: Tensor, dim: int) -> Tensor:
    r"""Second moments of a dimension, :math:`G G^\top` with that dimension's unfolding :math:`G`: ``[B, n, n]``.

    Args:
        x: ``[B, *shape]``.
        dim: a dimension of ``shape``, from 0.
    """
    rows = x.movedim(dim + 1, 1).reshape(x.shape[0], x.shape[dim + 1], -1)
    return rows @ rows.mT


def eigenbasis(p: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices ``[B, n, n]`` as columns, largest eigenvalue first.

    Zero gives the unit vectors. So does a matrix that is not finite, on which the solver would raise. Where the solver fails
    it runs again in float64.
    """
    p = torch.where(p.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), p, 0.0)
    try:
        vectors: Tensor = torch.linalg.eigh(p)[1]
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        vectors = torch.linalg.eigh(p.double())[1].to(p.dtype)
    return vectors.flip(-1)


def refreshed(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    r"""One step of power iteration from the basis ``q`` towards the eigenvectors of ``p``.

    .. math:: \pi = \operatorname{argsort}(-\operatorname{diag}(Q^\top P Q)) \qquad Q' = \operatorname{QR}(P\,Q_{:, \pi})

    Vyas et al. 2024 (arXiv:2409.11321), Algorithm 4, with the sorting of the authors' code. ``P`` is first shifted by 8
    rounding errors of its largest eigenvalue. Directions in its null space then stay unchanged instead of becoming
    noise; a larger shift would slow the directions of small eigenvalues too.

    Args:
        p: symmetric, positive semidefinite, ``[B, n, n]``.
        q: orthonormal columns, ``[B, n, n]``.

    Returns:
        The new basis, and the permutation ``[B, n]`` applied first: new column ``j`` comes from old column ``order[j]``. Where
        the basis cannot be computed (``p`` is not finite) the old columns are returned, in the new order.
    """
    image = p @ q
    values = (q * image).sum(-2)
    order = values.argsort(dim=-1, descending=True, stable=True)
    columns = order.unsqueeze(-2).expand_as(q)
    q, image = q.gather(-1, columns), image.gather(-1, columns)
    info = torch.finfo(p.dtype)
    largest = values.amax(-1)[:, None, None].clamp(min=info.tiny)
    fresh, good = orthonormal(image / largest + 8 * info.eps * q)
    return torch.where(good[:, None, None], fresh, q), order


def orthonormal(y: Tensor) -> tuple[Tensor, Tensor]:
    r"""The orthonormal factor of QR up to signs, by matrix products only: batched, and without synchronising with the host.

    .. math:: R^\top R = Y^\top Y + n \epsilon I \qquad Y \leftarrow Y R^{-1} \quad\text{with its columns normalised}

    Shifted Cholesky QR, Fukaya et al. 2020 (arXiv:1809.11085). ``R`` is triangular, so the span of the first ``j`` columns
    does not change, however often this is repeated; QR has the same property.

    Args:
        y: ``[B, n, n]``, with a condition number up to about 1 / (8 rounding errors).

    Returns:
        The factor, and ``[B]`` booleans: whether every pass succeeded. Failed rows are undefined.
    """
    info = torch.finfo(y.dtype)
    shift = y.shape[-1] * info.eps * torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)
    y = y / y.norm(dim=-2, keepdim=True).clamp(min=info.tiny)
    good = torch.ones_like(y[:, 0, 0], dtype=torch.bool)
    for _ in range(PASSES):
        r, failed = torch.linalg.cholesky_ex(y.mT @ y + shift, upper=True)
        y = torch.linalg.solve_triangular(r, y, upper=True, left=False)
        y = y / y.norm(dim=-2, keepdim=True).clamp(min=info.tiny)
        good &= failed == 0
    return y, good & y.isfinite().all(-1).all(-1)


def _along(x: Tensor, q: Tensor, dim: int) -> Tensor:
    """``x`` times ``q`` ``[B, n, k]`` along dimension ``dim`` of its blocks."""
    last = x.movedim(dim + 1, -1)
    product = last.reshape(x.shape[0], -1, last.shape[-1]) @ q
    return product.view(*last.shape[:-1], q.shape[-1]).movedim(-1, dim + 1)
