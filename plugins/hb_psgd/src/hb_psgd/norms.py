r"""Bounds of matrices' norms, and rotations towards symmetric matrices, on stacks ``[B, n, n]``. Pure functions.

Source: psgd_torch of October 2025, the implementation of Li 2015 (arXiv:1512.04202) by its author.

Products with a few vectors are torch's own: taking a matrix apart for ``c.products`` would cost more than they do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hbcore.api import Products

PROBES = 32
"""The number of vectors that the norm's power iteration starts from: the source's choice for float32."""
LARGEST_TURN = 1 / 8
"""The longest Procrustes step: a rotation by 1/8, truncated after the second order, is orthogonal to within 1e-4."""


def largest(x: Tensor) -> Tensor:
    """The largest magnitude in each block of a stack, ``[B]``; NaN if one is in it."""
    x = x.flatten(1)
    if x.is_cuda:
        size: Tensor = torch.linalg.vector_norm(x, float("inf"), dim=-1)
        return size
    return torch.maximum(x.amax(-1), -x.amin(-1))  # a CPU takes longer for the norm


def norm_bound(a: Tensor, start: Tensor, iterations: int = 2) -> Tensor:
    r"""A lower bound, usually tight, of the spectral norm of symmetric positive or of skew-symmetric matrices; ``[B]``.

    Power iteration from a bundle of vectors, the rows of V, that all lean towards the longest row :math:`a_j` of
    :math:`A`, here divided by its largest element :math:`s`:

    .. math::
        v \leftarrow a_j + \mathrm{sgn}(\langle a_j, v \rangle)\, v \qquad
        \text{repeatedly } v \leftarrow vA,\; v \leftarrow v / \lVert v \rVert,\; v \leftarrow vA \qquad
        \lVert A \rVert \ge s \max_v \lVert v \rVert

    The longest row alone may be orthogonal to the wanted singular vector; the random ones are not.

    Args:
        a: ``[B, n, n]``; the bound of a matrix of zeros is 0.
        start: standard normal numbers, ``[B, k, n]``.
        iterations: the number of repetitions of the pair of products, at least 1.
    """
    size = largest(a)
    return size * _bound(a / (size + torch.finfo(a.dtype).tiny)[:, None, None], start, iterations)


def _bound(a: Tensor, start: Tensor, iterations: int) -> Tensor:
    """:func:`norm_bound` of matrices whose largest element is 1."""
    tiny = torch.finfo(a.dtype).tiny
    j = torch.linalg.vector_norm(a, dim=-1).argmax(-1)
    longest = a.gather(1, j[:, None, None].expand(-1, 1, a.shape[-1]))
    v = torch.addcmul(longest, torch.bmm(start, longest.mT).sign_(), start)
    for i in range(iterations):
        v = torch.bmm(v, a)
        if i or iterations == 1:  # three products of vectors of normal size with a matrix of such elements do not overflow
            v /= torch.linalg.vector_norm(v, dim=-1, keepdim=True).add_(tiny)
        v = torch.bmm(v, a)
    bound: Tensor = torch.linalg.vector_norm(v, dim=-1).amax(-1)
    return bound


def procrustes(q: Tensor, start: Tensor, products: Products, iterations: int = 2) -> Tensor:
    r"""One step that rotates each matrix of ``q``, ``[B, n, n]``, towards the symmetric one with the same :math:`Q^T Q`.

    .. math::
        R = \frac{Q^T - Q}{\lVert Q^T - Q \rVert} \qquad Q \leftarrow Q + a R Q + \tfrac{a^2}{2} R R Q \qquad
        a = \min\!\left(\tfrac18,\; \frac{\mathrm{tr}(R Q)}{-\mathrm{tr}(R R Q)}\right)

    which is :math:`\exp(aR) Q` to second order, with the a that makes :math:`\mathrm{tr}(Q)` largest. If
    :math:`\mathrm{tr}(RRQ) \ge 0` the trace grows with a, and a is 1/8.

    Args:
        q: the matrices.
        start, iterations: :func:`norm_bound`'s.
        products: how to multiply.
    """
    tiny = torch.finfo(q.dtype).tiny
    r = q.mT - q
    r /= (largest(r) + tiny)[:, None, None]
    r /= (_bound(r, start, iterations) + tiny)[:, None, None]
    rq = products.matmul(r, q)
    turned = products.matmul(r, rq)
    gain, curvature = trace(rq), trace(turned)
    a = torch.where(curvature < 0, (-gain / curvature).clamp(max=LARGEST_TURN), LARGEST_TURN)[:, None, None]
    return turned.mul_(0.5 * a).add_(rq).mul_(a).add_(q)


def trace(a: Tensor) -> Tensor:
    """The traces of a stack of matrices, ``[B]``."""
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)
