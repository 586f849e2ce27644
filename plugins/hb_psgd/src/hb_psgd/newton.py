r"""The Newton form of PSGD: Kronecker factors fitted to a Hessian-vector product rather than to gradients. Pure functions.

The preconditioner :math:`P = Q^T Q` minimises :math:`\mathrm{E}[h^T P h + v^T P^{-1} v]` for :math:`h = Hv` and
:math:`v \sim \mathcal N(0, I)`, which :math:`P = (H^2)^{-1/2}`, the inverse Hessian's absolute value, does. Whitening is the
same fit with a gradient for h, and the mean over v in place of v. Shapes are those of :mod:`hb_psgd.kron`.

Sources: Li 2015, Preconditioned Stochastic Gradient Descent (arXiv:1512.04202); and psgd_torch of October 2025,
whose ``update_precond_kron_newton_q0p5eq1p5`` :func:`newton_update` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hb_psgd import kron
from hb_psgd.kron import Number


def newton_update(
    h: Tensor,
    v: Tensor,
    factors: Sequence[Tensor],
    bounds: Sequence[Tensor],
    *,
    lr: Number,
    beta: Number,
    probe: Callable[[Tensor], Tensor],
    iterations: int = 2,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Fit the factors so that :math:`P h` has the second moments of v: the rule Q0.5EQ1.5, or PRO, in Newton form.

    .. math::
        T = \mathrm{contract}_i(Ph, Ph) \qquad S = \mathrm{contract}_i(v, v) \qquad
        \ell = \lVert T + S \rVert \qquad L_i \leftarrow \max(\beta L_i + (1 - \beta)\,\ell,\; \ell) \\
        Q_i \leftarrow Q_i - \frac{\mathrm{lr}}{L_i} (T - S)\, Q_i
        \qquad\text{and, if it is dense, } Q_i \leftarrow \mathrm{procrustes}(Q_i)

    For a diagonal factor T and S are diagonals too, and the norm is the largest element. Where :math:`Ph = v` nothing changes,
    whatever v is: unlike whitening, the fit has no noise of its own at its solution.

    Args:
        h: the dampened Hessian-vector products, ``[B, *shape]``.
        v: their vectors.
        factors: one for each dimension.
        bounds: the running :math:`L_i`, each ``[B]``, 0 at first.
        lr: the factors' learning rate, in [0, 1].
        beta: the decay of :math:`L_i`, in [0, 1).
        probe: draws standard normal numbers of its argument's shape; called once for each dense factor.
        iterations: of :func:`hb_psgd.kron.norm_bound`.

    Returns:
        The new factors, balanced, and the new bounds.
    """
    ph = kron.precondition(h, factors)
    fitted, smooth = [], []
    for i, (q, bound) in enumerate(zip(factors, bounds, strict=True)):
        dense, n = q.ndim == 3, q.shape[-1]
        t, wanted = kron.second_moments(ph, i, dense), kron.second_moments(v, i, dense)
        if dense:
            start = probe(h.new_empty(len(h), kron.PROBES, n))
            norm = kron.norm_bound(t + wanted, start, iterations)
        else:
            norm = (t + wanted).amax(-1)
        bound = torch.maximum(beta * bound + (1 - beta) * norm, norm)
        rate = (lr / bound).view(-1, *[1] * (q.ndim - 1))
        q = q - rate * ((t - wanted) @ q if dense else (t - wanted) * q)
        fitted.append(kron.procrustes(q, start, iterations) if dense else q)
        smooth.append(bound)
    return kron.balance(fitted), smooth


def newton_scale(h: Tensor, v: Tensor, dampening: Number) -> Tensor:
    r"""The s whose :math:`s^2 h` is about as large as v, ``[B]`` in float64; 0 where h is 0 or not finite.

    .. math:: s = \mathrm{mean}(v^2)^{1/4} \left(\mathrm{mean}(h^4) + \mathrm{dampening}^4\right)^{-1/8}

    The source's first guess of a preconditioner's scale.
    """
    square = torch.linalg.vector_norm(v.flatten(1), dim=-1, dtype=torch.float64).square() / v[0].numel()
    scale: Tensor = square**0.25 * kron.whitening_scale(h, dampening)
    return scale


def first_scale(x: Tensor, h: Tensor | None, v: Tensor | None, dampening: Number) -> Tensor:
    """:func:`newton_scale` where there is a product that is finite and not 0; elsewhere the scale that whitens ``x``."""
    whitening = kron.whitening_scale(x, dampening)
    if h is None or v is None:
        return whitening
    curved = newton_scale(h, v, dampening)
    return torch.where(curved > 0, curved, whitening)
