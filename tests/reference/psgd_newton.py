"""The Newton form of PSGD's rule PRO in float64, one tensor at a time, from psgd_torch's description of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from reference.options import Array
from reference.psgd import Draw, contracted, lower_bound, preconditioned, rotated


def newton_pro(
    h: Array, v: Array, factors: Sequence[Array], lipschitz: list[float], draw: Draw, lr: float, beta: float, half_iters: int
) -> list[Array]:
    """psgd_torch's update_precond_kron_newton_q0p5eq1p5, for a pair (v, h = H v); ``lipschitz`` is updated in place::

        term1 = contract_i(P h, P h),  term2 = contract_i(v, v)
        ell   = norm_lower_bound_spd(term1 + term2)                       (max for a diagonal factor)
        L_i   = max(beta L_i + (1 - beta) ell, ell)
        Q_i   = Q_i - lr / L_i (term1 - term2) Q_i,   then procrustes_step2(Q_i) if it is a matrix

    Balances every time: P does not notice.
    """
    ph = preconditioned(h, factors)
    fitted = []
    for i, q in enumerate(factors):
        term1, term2 = contracted(ph, i), contracted(v, i)
        noise = draw((32, len(q))) if q.ndim == 2 else None
        ell = lower_bound(term1 + term2, noise, half_iters) if q.ndim == 2 else np.diag(term1 + term2).max()
        lipschitz[i] = max(beta * lipschitz[i] + (1 - beta) * ell, ell)
        if q.ndim == 2:
            q = rotated(q - lr / lipschitz[i] * (term1 - term2) @ q, noise, half_iters)
        else:
            q = q * (1 - lr / lipschitz[i] * np.diag(term1 - term2))
        fitted.append(q)
    sizes = [np.abs(q).max() for q in fitted]
    common = math.prod(sizes) ** (1 / len(sizes))
    return [q * (common / size) for q, size in zip(fitted, sizes, strict=True)]
