r"""A low-rank preconditioner of one long vector. Pure functions; :mod:`hb_psgd.lra_passes` has the passes over its factors.

For vectors of N elements it is :math:`P = Q^T Q` with :math:`Q = (I + U V^T)\,\mathrm{diag}(d)`, where ``U`` and ``V`` are
``[N, r]`` and ``d`` is ``[N]``. Everything that is not of length N is r numbers or r x r, and in float64.

The vector may be spread over ranks, each of which has some of the rows of ``U``, ``V`` and ``d``: sums over all rows go through
:class:`Sums`, and nothing else travels.

Sources: Li 2015, Preconditioned Stochastic Gradient Descent (arXiv:1512.04202); Pooladzandi and Li 2024, Curvature-Informed
SGD via General Purpose Lie-Group Preconditioners (arXiv:2402.11858), section 4; and the author's psgd_torch of 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from hb_psgd.lra_passes import NONE, Change, Moments, ends, grown, inner, moments, pair, plus, through

Number: TypeAlias = "Tensor | float"

TURN = 0.1
"""How far one balancing turns U and V towards equal Gram matrices: the source's choice."""

FAR = 10.0
"""How far off the scale of Q may be before it is put right at once: by steps, a factor of 10 may take a thousand."""


class Sums(NamedTuple):
    """How ranks agree.

    Attributes:
        total: the sum over the ranks of a tensor that each has a part of.
        amax: the largest element over the ranks of a tensor, 0-d.
    """

    total: Callable[[Tensor], Tensor]
    amax: Callable[[Tensor], Tensor]

    def largest(self, x: Tensor) -> Tensor:
        """The largest absolute value of a vector, of which a rank may have nothing; 0-d."""
        return self.amax(torch.linalg.vector_norm(x, float("inf")) if x.numel() else x.new_zeros(()))


class Fit(NamedTuple):
    """A fitted preconditioner: the new ``d`` and ``bounds``, and what becomes of U and V."""

    d: Tensor
    bounds: Tensor
    u: Change
    v: Change


def precondition(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    d: Tensor,
    total: Callable[[Tensor], Tensor],
    out: Tensor | None = None,
    changes: tuple[Change, Change] = (NONE, NONE),
) -> Tensor:
    r""":math:`P x = \mathrm{diag}(d) (I + V U^T)(I + U V^T)\,\mathrm{diag}(d)\, x`; reads V twice and U once.

    It is written to ``out`` if given, which may be x's own memory. U and V are first overwritten with what ``changes`` make of
    them, when they are read anyway.
    """
    of_u, of_v = changes
    x, back = through(x, u, total(inner(v, x, d, of_v)), d, of_u)
    return plus(x, v, total(back), d, out)


def begun(d: Tensor, x: Tensor, dampening: Number, numel: Number, sums: Sums, factor: Number, power: float | None) -> Tensor:
    r"""``d``; where it is zero, :math:`(a s)^b` with the s whose :math:`s^2 x` has elements of about size 1.

    .. math:: s = \left(\mathrm{mean}(x^4) + \mathrm{dampening}^4\right)^{-1/8}

    It stays zero while ``x`` is zero. ``factor`` is a, ``power`` b, ``numel`` the length of the whole vector.
    """
    largest = sums.largest(x)
    safe = torch.where(largest > 0, largest, 1)
    fourth = sums.total((x / safe).square_().square_().sum(dtype=torch.float64)) / numel
    scale = factor * (fourth * safe.double() ** 4 + dampening**4) ** -0.125
    scale = scale if power is None else scale**power
    return torch.where(d == 0, torch.where(largest > 0, scale, 0.0).to(d.dtype), d)


def balancing(uu: Tensor, vv: Tensor) -> tuple[Tensor, Tensor]:
    r"""The ``[r, r]`` A and B for which :math:`U A` and :math:`V B` have the same norm and more similar Gram matrices.

    .. math::
        \rho = \left(\frac{\mathrm{tr}\, U^T U}{\mathrm{tr}\, V^T V}\right)^{1/4} \qquad
        E = 0.1\, \frac{U^T U / \rho^2 - \rho^2 V^T V}{\mathrm{tr}(U^T U) / \rho^2 + \rho^2\, \mathrm{tr}(V^T V)} \\
        A = (I - E + E^2 / 2) / \rho \qquad B = (I + E + E^2 / 2)\, \rho \qquad A B^T = I + E^4 / 4

    so that :math:`U V^T` stays what it is. Factors of zeros are left alone.
    """
    ratio = uu.trace() / vv.trace()
    rho = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1).pow(0.25)
    e = uu / rho**2 - vv * rho**2
    e = TURN * e / (uu.trace() / rho**2 + vv.trace() * rho**2).clamp(min=torch.finfo(e.dtype).tiny)
    half = _identity(uu) + e @ e / 2
    return (half - e) / rho, (half + e) * rho


def fit(
    t: Tensor, probe: Tensor, u: Tensor, v: Tensor, d: Tensor, bounds: Tensor,
    *, on_u: bool, balance: bool, lr: Number, beta: Number, eps: Number, dampening: Number, relative: float, sums: Sums,
    out: Tensor | None = None,
) -> Fit:  # fmt: skip
    r"""Fit the preconditioner so that it whitens t: one step, relative to Q, down the gradient of
    :math:`h^T P h + v^T P^{-1} v`, where v is the standard normal ``probe``.

    .. math::
        h = t + (\mathrm{dampening} + \mathrm{relative}\, |t|) \odot v \\
        a = Q h \qquad b = Q^{-T} v \qquad K = I + V^T U \\
        d \leftarrow d - \tfrac{\mathrm{lr}}{L_d} (h \odot P h - v \odot P^{-1} v) \odot d \\
        U \leftarrow U - \tfrac{\mathrm{lr}}{L_u} (a a^T - b b^T) V K \quad\text{or}\quad
        V \leftarrow V - \tfrac{\mathrm{lr}}{L_v} (I + V U^T)(a a^T - b b^T) U

    Each L is the running maximum :math:`\max(\beta L + (1 - \beta) \ell, \ell)` of a bound :math:`\ell` on the step:
    :math:`\lVert h \odot P h \rVert_\infty + \lVert v \odot P^{-1} v \rVert_\infty` for d, and
    :math:`\lVert a \rVert \lVert V V^T a \rVert + \lVert b \rVert \lVert V V^T b \rVert` for U. Inverses of Q come from K,
    by Woodbury's identity, and both vectors are divided by their largest element before anything is squared. Where the norms
    of a and b are further apart than :data:`FAR` squared, as when the first gradient was 1e25, d is multiplied by
    :math:`\sqrt{\lVert b \rVert / \lVert a \rVert}`, the best single number, instead; U and V wait, and the bounds,
    which are as large as h, start again.

    Args:
        t: the gradient or momentum, ``[N]``.
        bounds: :math:`L_d, L_u, L_v`, ``[3]``; 0 at first.
        on_u: whether U is fitted, or V; the source draws lots.
        balance: whether both factors are balanced first, :func:`balancing`; both are rewritten then.
        lr: in [0, 1].
        beta: in [0, 1).
        eps: the smallest L.
        out: memory for the new d, which may be d's own.

    Returns:
        The fit. If t is zero or not finite, or K is singular, it changes nothing.
    """
    x, y, local = pair(t, probe, d, float(dampening), float(relative))
    del t, probe  # each vector counts
    sizes = torch.stack([sums.amax(size) for size in local]).double()
    size = sizes[1:].amax()
    usable = size.isfinite() & (sizes > 0).all()
    inverse = torch.where(usable, 1 / size, 0.0).to(x.dtype)
    s = _solved(moments(u, v, x, y, inverse, sums.total), usable, on_u, balance, x.dtype)
    e = ends(u, v, x, y, inverse, on_u, s.ux, s.vx, s.uy, s.vy)
    del x, y
    na, nb = sums.total(e.squares).sqrt()
    own = torch.stack((sums.amax(e.gain) + sums.amax(e.loss), na * s.lengths[0] + nb * s.lengths[1]))
    before = torch.stack((bounds[0], bounds[1 if on_u else 2]))
    risen = torch.maximum(torch.maximum(beta * (before.double() / size**2) + (1 - beta) * own, own), eps / size**2)
    fits = s.fits & risen.isfinite().all()
    scale = (nb / na).sqrt()
    far = fits & scale.isfinite() & ((scale > FAR) | (scale < 1 / FAR))
    steps = torch.where(fits & ~far, lr / risen, 0.0)

    one, by = torch.where(far, scale, torch.ones_like(scale)), -steps[0]  # steps are 0 where it is far
    kept = torch.where(fits, (risen * size**2).clamp(max=torch.finfo(bounds.dtype).max).to(bounds.dtype), before)
    kept = torch.stack((kept[0], kept[1], bounds[2]) if on_u else (kept[0], bounds[1], kept[1]))
    kept = torch.where(far, 0.0, kept)
    moved = ((e.first, e.second), (-steps[1] * s.weights[0], steps[1] * s.weights[1]))
    new_u = Change(s.turn_u, *(moved if on_u else ()))
    new_v = Change(s.turn_v, *(() if on_u else moved))
    return Fit(grown(d, e.gap, one, by, out), kept, new_u, new_v)


class _Solved(NamedTuple):
    r"""What follows from the moments, in coordinates of the present U and V.

    Attributes:
        ux, vx: :math:`a = x + U u_x` and :math:`(I + V U^T) a = a + V v_x`.
        vy, uy: :math:`b = y - V v_y` and :math:`Q^{-1} b = b - U u_y`, up to d.
        lengths: of :math:`V V^T a` and :math:`V V^T b`, or the same with U.
        weights: of the two columns that are added to the fitted factor.
        turn_u, turn_v: what balances the factors; None for nothing.
        fits: whether all of it is finite; if not, it is zeros.
    """

    ux: Tensor
    vx: Tensor
    vy: Tensor
    uy: Tensor
    lengths: tuple[Tensor, Tensor]
    weights: tuple[Tensor, Tensor]
    turn_u: Tensor | None
    turn_v: Tensor | None
    fits: Tensor


def _solved(m: Moments, usable: Tensor, on_u: bool, balance: bool, dtype: torch.dtype) -> _Solved:
    """The r x r part of a fit."""
    one = _identity(m.uu)
    turn_u, turn_v = balancing(m.uu, m.vv) if balance else (one, one)
    m = _turned(m, turn_u, turn_v)
    k = one + m.vu
    w = _solve(k.mT, m.uy)  # U^T b
    va, vb = k @ m.vx, m.vy - m.vv @ w  # V^T a, V^T b
    ua = m.ux + m.uu @ m.vx  # U^T a
    gram, (ca, cb) = (m.vv, (va, vb)) if on_u else (m.uu, (ua, w))
    weights = (k.mT @ va, k.mT @ vb) if on_u else (ua, w)
    found = (turn_u @ m.vx, turn_v @ ua, turn_v @ w, turn_u @ _solve(k, vb), *weights, turn_u, turn_v)
    fits = usable & torch.stack([c.isfinite().all() for c in found]).all()
    ux, vx, vy, uy, wa, wb = (torch.where(fits, c, 0.0).to(dtype) for c in found[:6])
    stay = [torch.where(fits, turn, one).to(dtype) if balance else None for turn in (turn_u, turn_v)]
    return _Solved(ux, vx, vy, uy, (_length(gram, ca), _length(gram, cb)), (wa, wb), stay[0], stay[1], fits)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _turned(m: Moments, a: Tensor, b: Tensor) -> Moments:
    """The moments of U A and V B."""
    return Moments(a.mT @ m.uu @ a, b.mT @ m.vv @ b, b.mT @ m.vu @ a, a.mT @ m.ux, b.mT @ m.vx, a.mT @ m.uy, b.mT @ m.vy)


def _solve(a: Tensor, b: Tensor) -> Tensor:
    """The solution of ``a x = b``, without waiting for the device to say whether ``a`` is singular."""
    solution: Tensor = torch.linalg.solve_ex(a, b.unsqueeze(1))[0]
    return solution.squeeze(1)


def _length(gram: Tensor, c: Tensor) -> Tensor:
    """The norm of ``U c``, by the Gram matrix of U."""
    return (c @ (gram @ c)).clamp(min=0).sqrt()
