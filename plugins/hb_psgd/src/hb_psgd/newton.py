r"""The Newton form of PSGD: Kronecker factors fitted to a Hessian-vector product rather than to gradients. Pure functions.

The preconditioner :math:`P = Q^T Q` minimises :math:`\mathrm{E}[h^T P h + v^T P^{-1} v]` for :math:`h = Hv` and
:math:`v \sim \mathcal N(0, I)`, which :math:`P = (H^2)^{-1/2}`, the inverse Hessian's absolute value, does. Whitening is the
same fit with a gradient for h, and the mean over v in place of v. Shapes are those of :mod:`hb_psgd.kron`.

:mod:`hb_psgd.factor_rules` has the rules. Here is how they start.

Sources: Li 2015, Preconditioned Stochastic Gradient Descent (arXiv:1512.04202); and psgd_torch of October 2025.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hb_psgd import kron
from hb_psgd.kron import Number


def newton_scale(h: Tensor, v: Tensor, dampening: Number) -> Tensor:
    r"""The s whose :math:`s^2 h` is about as large as v, ``[B]`` in float64; 0 where h is 0 or not finite.

    .. math:: s = \mathrm{mean}(v^2)^{1/4} \left(\mathrm{mean}(h^4) + \mathrm{dampening}^4\right)^{-1/8}

    The source's first guess of a preconditioner's scale.
    """
    square = torch.linalg.vector_norm(v.flatten(1), dim=-1, dtype=torch.float64).square() / v[0].numel()
    scale: Tensor = square**0.25 * kron.whitening_scale(h, dampening)
    return scale


def first_scales(xs: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor] | None], dampening: Number) -> Tensor:
    """For the blocks of several stacks, one after the other: :func:`newton_scale` where there is a product that is finite and
    not 0; elsewhere the scale that whitens ``x``."""
    whitening = kron.whitening_scales(xs, dampening)
    if all(pair is None for pair in pairs):
        return whitening
    curved = [
        x.new_zeros(len(x)) if pair is None else newton_scale(*pair, dampening) for x, pair in zip(xs, pairs, strict=True)
    ]
    scale = torch.cat(curved)
    return torch.where(scale > 0, scale, whitening)
