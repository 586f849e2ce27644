r"""The passes over ``[N, r]`` that a low-rank preconditioner takes, each of which reads its matrices once.

On a GPU they are kernels of :mod:`hb_psgd.lra_kernel` and :mod:`hb_psgd.lra_factor_kernel`, elsewhere products of torch.
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

    turn: Tensor | None = None
    columns: Sequence[Tensor] = ()
    weights: Sequence[Tensor] = ()

    @property
    def changes(self) -> bool:
        """Whether it is anything."""
        return self.turn is not None or bool(self.columns)

    def together(self, dtype: torch.dtype) -> Tensor | None:
        """The weights as one tensor, ``[2, r]``."""
        return torch.stack([*self.weights]).to(dtype) if self.columns else None


NONE = Change()
"""A factor stays what it is."""


def inner(a: Tensor, x: Tensor, d: Tensor, change: Change = NONE) -> Tensor:
    """:math:`A^T (d x)` for ``[N, r]`` and ``[N]``, where A is first overwritten with what becomes of it."""
    if not _has_kernels(a):
        return rewrite(a, change).mT @ (d * x)
    from hb_psgd import lra_factor_kernel  # Triton is slow to import, and not everywhere

    return lra_factor_kernel.inner(a, x, d, change)


def plus(x: Tensor, a: Tensor, c: Tensor, d: Tensor, out: Tensor | None = None) -> Tensor:
    """:math:`d (x + A c)` for ``[N]``, ``[N, r]`` and ``[r]``; written to ``out`` if given, memory of none of them."""
    if not _has_kernels(a):
        result = torch.addmv(x, a, c)
        return torch.mul(result, d, out=result if out is None else out)
    from hb_psgd import lra_kernel

    return lra_kernel.plus(x, a, c, d, out)


def through(x: Tensor, a: Tensor, c: Tensor, d: Tensor, change: Change = NONE) -> tuple[Tensor, Tensor]:
    """:math:`y = d x + A c`, and :math:`A^T y`; A is first overwritten with what becomes of it."""
    if not _has_kernels(a):
        y = torch.addmv(d * x, rewrite(a, change), c)
        return y, a.mT @ y
    from hb_psgd import lra_factor_kernel

    return lra_factor_kernel.through(x, a, c, d, change)


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


def grown(d: Tensor, gap: Tensor, one: Tensor, by: Tensor, out: Tensor | None = None) -> Tensor:
    """``d (one + by gap)`` for vectors and numbers, 0-d; perhaps in the memory ``out``, which may be d's."""
    one, by = one.to(d.dtype), by.to(d.dtype)
    if not _has_kernels(d[:, None]):
        factor = torch.addcmul(one, gap, by)
        return torch.mul(factor, d, out=factor if out is None else out)
    from hb_psgd import lra_kernel

    return lra_kernel.grown(d, gap, one, by, out)


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


def ends(
    u: Tensor, v: Tensor, x: Tensor, y: Tensor, scale: Tensor, on_u: bool, ux: Tensor, vx: Tensor, uy: Tensor, vy: Tensor
) -> Ends:
    r"""In one pass over U and V, :math:`a = x + U u_x`, :math:`b = y - V v_y`, :math:`(I + V U^T) a = a + V v_x` and
    :math:`(I + U V^T)^{-1} b = b - U u_y`, which times x and y are the parts of the gap.

    x and y count times ``scale``, 0-d; they may be overwritten.
    """
    if _has_kernels(u):
        from hb_psgd import lra_kernel

        return Ends(*lra_kernel.ends(u, v, x, y, scale, on_u, torch.stack((ux, uy)), torch.stack((vx, vy))))
    torch._foreach_mul_([x, y], scale)
    a, b = torch.addmv(x, u, ux), torch.addmv(y, v, vy, alpha=-1)
    squares = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in (a, b)])
    lifted = torch.addmv(a, v, vx)
    columns = (a, b) if on_u else (lifted, y)
    gain, loss = lifted * x, torch.addmv(b, u, uy, alpha=-1).mul_(y)
    del a, b, lifted  # each vector counts
    most = [torch.linalg.vector_norm(t, float("inf")) if len(t) else t.new_zeros(()) for t in (gain, loss)]
    return Ends(*columns, gain.sub_(loss), most[0], most[1], squares)


def moments(u: Tensor, v: Tensor, x: Tensor, y: Tensor, scale: Tensor, total: Callable[[Tensor], Tensor]) -> Moments:
    """All in one pass over U and V; ``total`` sums over the ranks.

    x and y count times ``scale``, 0-d. The sums are scaled: a kernel that scales each element takes seven times as long.
    """
    r = u.shape[1]
    if _has_kernels(u):
        from hb_psgd import lra_kernel

        parts = lra_kernel.moments(u, v, x, y)
    else:
        parts = [_product(u, u), _product(v, v), _product(v, u), u.mT @ x, v.mT @ x, u.mT @ y, v.mT @ y]
    whole = total(torch.cat([part.reshape(-1) for part in parts]).double())
    squares, lines = whole[: 3 * r * r].view(3, r, r), whole[3 * r * r :].view(4, r) * scale
    return Moments(*squares.unbind(), *lines.unbind())


def rewrite(factor: Tensor, change: Change) -> Tensor:
    """Overwrite ``factor``, U or V, with what becomes of it; nothing of its size is made."""
    if not change.changes:
        return factor
    if _has_kernels(factor):
        from hb_psgd import lra_factor_kernel

        lra_factor_kernel.rewrite(factor, change)
        return factor
    weights = change.together(factor.dtype)
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
