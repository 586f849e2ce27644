r"""The passes over ``[N, r]`` that a low-rank preconditioner takes, each of which reads its matrices once.

On a GPU they are kernels of :mod:`hb_psgd.lra_kernel`, elsewhere products of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hbcore.api import launching

ROWS = 2**22
"""How many rows are rewritten at once where torch does it, so that no second ``[N, r]`` is ever held."""

PIECE = 1024
"""How many rows of a product over all rows torch sums at once."""

WIDEST = 64
"""The largest rank that the kernels take: a tile has as many columns."""


class Moments(NamedTuple):
    """Products of the factors with each other, ``[r, r]``, and with two vectors, ``[r]``."""

    uu: Tensor
    vv: Tensor
    vu: Tensor
    ux: Tensor
    vx: Tensor
    uy: Tensor
    vy: Tensor


class Change(NamedTuple):
    r"""What becomes of one factor: :math:`U \leftarrow U T + \sum_k c_k w_k^T`.

    Attributes:
        turn: T, ``[r, r]``; None for the identity.
        columns: two :math:`c_k`, ``[N]`` each, or none.
        weights: as many :math:`w_k`, ``[r]`` each.
    """

    turn: Tensor | None
    columns: Sequence[Tensor] = ()
    weights: Sequence[Tensor] = ()


def inner(a: Tensor, x: Tensor, d: Tensor | None = None) -> Tensor:
    """:math:`A^T x` for ``[N, r]`` and ``[N]``, or :math:`A^T (d x)`."""
    if not _has_kernels(a):
        return a.mT @ (x if d is None else d * x)
    from hb_psgd import lra_kernel  # Triton is slow to import, and not everywhere

    return lra_kernel.inner(a, x, d)


def plus(
    x: Tensor, a: Tensor, c: Tensor, *, first: Tensor | None = None, last: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """:math:`x + A c` for ``[N]``, ``[N, r]`` and ``[r]``.

    ``first`` multiplies x, and ``last`` the result, which is written to ``out`` if given: memory of none of them.
    """
    if not _has_kernels(a):
        result = torch.addmv(x if first is None else first * x, a, c)
        return torch.mul(result, 1 if last is None else last, out=result if out is None else out)
    from hb_psgd import lra_kernel

    return lra_kernel.plus(x, a, c, first, last, out)


def through(x: Tensor, a: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """:math:`y = d x + A c`, as :func:`plus` has it, and :math:`A^T y`."""
    if not _has_kernels(a):
        y = plus(x, a, c, first=d)
        return y, inner(a, y)
    from hb_psgd import lra_kernel

    return lra_kernel.through(x, a, c, d)


def pair(
    t: Tensor, probe: Tensor, d: Tensor, dampening: float, relative: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    r""":math:`x = d \odot (t + (\mathrm{dampening} + \mathrm{relative} |t|) \odot v)` and :math:`y = v / d`, ``[N]`` each.

    ``probe`` is v. y is 0 where d is. Also the largest absolute values of t, x and y, 0-d: inf where one is not finite; a 0 is
    in its place.
    """
    if _has_kernels(t[:, None]):
        from hb_psgd import lra_kernel

        return lra_kernel.pair(t, probe, d, dampening, relative)
    h = torch.addcmul(t, t.abs().mul_(relative).add_(dampening), probe)
    vectors = (t, d * h, torch.where(d > 0, probe / d, 0.0))
    sizes = [torch.linalg.vector_norm(z, float("inf")) if len(z) else z.new_zeros(()) for z in vectors]
    _, x, y = (torch.where(z.isfinite(), z, 0.0) for z in vectors)
    first, second, third = (torch.where(size.isfinite(), size, float("inf")) for size in sizes)
    return x, y, (first, second, third)


class Ends(NamedTuple):
    r"""What a fit needs of a and b, ``[N]`` each and 0-d.

    Attributes:
        first, second: the columns that the fitted factor is moved by: a and b for U, :math:`(I + V U^T) a` and y for V.
        gap: :math:`h \odot P h - v \odot P^{-1} v`.
        gain, loss: the largest absolute values of its two parts.
        squares: the squared norms of a and b, ``[2]`` in float64.
    """

    first: Tensor
    second: Tensor
    gap: Tensor
    gain: Tensor
    loss: Tensor
    squares: Tensor


def ends(u: Tensor, v: Tensor, x: Tensor, y: Tensor, on_u: bool, ux: Tensor, vx: Tensor, uy: Tensor, vy: Tensor) -> Ends:
    r"""In one pass over U and V, :math:`a = x + U u_x`, :math:`b = y - V v_y`, :math:`(I + V U^T) a = a + V v_x` and
    :math:`(I + U V^T)^{-1} b = b - U u_y`, which times x and y are the parts of the gap."""
    if _has_kernels(u):
        from hb_psgd import lra_kernel

        return Ends(*lra_kernel.ends(u, v, x, y, on_u, torch.stack((ux, uy)), torch.stack((vx, vy))))
    a, b = torch.addmv(x, u, ux), torch.addmv(y, v, vy, alpha=-1)
    squares = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in (a, b)])
    lifted = torch.addmv(a, v, vx)
    columns = (a, b) if on_u else (lifted, y)
    gain, loss = lifted * x, torch.addmv(b, u, uy, alpha=-1).mul_(y)
    del a, b, lifted  # each vector counts
    most = [torch.linalg.vector_norm(t, float("inf")) if len(t) else t.new_zeros(()) for t in (gain, loss)]
    return Ends(*columns, gain.sub_(loss), most[0], most[1], squares)


def moments(u: Tensor, v: Tensor, x: Tensor, y: Tensor, total: Callable[[Tensor], Tensor]) -> Moments:
    """All in one pass over U and V; ``total`` sums over the ranks."""
    r = u.shape[1]
    if _has_kernels(u):
        from hb_psgd import lra_kernel

        parts = lra_kernel.moments(u, v, x, y)
    else:
        parts = [_product(u, u), _product(v, v), _product(v, u), u.mT @ x, v.mT @ x, u.mT @ y, v.mT @ y]
    whole = total(torch.cat([part.reshape(-1) for part in parts]).double())
    squares, lines = whole[: 3 * r * r].view(3, r, r), whole[3 * r * r :].view(4, r)
    return Moments(*squares.unbind(), *lines.unbind())


def rewrite(factor: Tensor, change: Change) -> Tensor:
    """Overwrite ``factor``, U or V, with what becomes of it; nothing of its size is made."""
    if change.turn is None and not change.columns:
        return factor
    weights = torch.stack([*change.weights]).to(factor.dtype) if change.columns else None
    if _has_kernels(factor):
        from hb_psgd import lra_kernel

        lra_kernel.rewrite(factor, change.turn, [*change.columns], weights)
        return factor
    for first in range(0, len(factor), ROWS):
        rows = slice(first, first + ROWS)
        piece = factor[rows]
        new = piece if change.turn is None else piece @ change.turn
        if weights is not None:
            new = torch.addmm(new, torch.stack([c[rows] for c in change.columns], 1), weights)
        piece.copy_(new)
    return factor


def _product(a: Tensor, b: Tensor) -> Tensor:
    """:math:`A^T B` for two ``[N, r]``, piece by piece: a CPU takes a third of the time of one long product."""
    r, count = a.shape[1], len(a) // PIECE
    whole = count * PIECE
    pieces = torch.bmm(a[:whole].view(count, PIECE, r).mT, b[:whole].view(count, PIECE, r)).sum(0)
    return pieces + a[whole:].mT @ b[whole:]


def _has_kernels(a: Tensor) -> bool:
    """Whether generated kernels take ``[N, r]``: on a GPU, in float32, if it is not too wide and has rows."""
    return a.is_cuda and a.dtype == torch.float32 and 0 < a.shape[1] <= WIDEST and len(a) > 0 and launching.has_triton()
