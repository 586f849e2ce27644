r"""Kronecker-factored preconditioners on stacks of equal blocks. Pure functions; blocks are independent.

A block is a tensor of shape :math:`(n_0, \dots, n_{d-1})`; a stack of B of them is ``x``, ``[B, n_0, ..., n_{d-1}]``. Its
preconditioner is :math:`P = Q^T Q` with :math:`Q = Q_0 \otimes \dots \otimes Q_{d-1}`. Factor i is a stack of matrices
``[B, n_i, n_i]`` (dense), or of the diagonals of matrices ``[B, n_i]``.

Sources: Li 2015, Preconditioned Stochastic Gradient Descent (arXiv:1512.04202); Pooladzandi and Li 2024, Curvature-Informed
SGD via General Purpose Lie-Group Preconditioners (arXiv:2402.11858); and the author's own implementation, psgd_torch of
October 2025, whose rule "Q0.5EQ1.5" or PRO (for Procrustes) is :func:`pro_update`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hbcore.api import OptionError

Number: TypeAlias = "Tensor | float"

MEMORY_SAVE_MODES = (None, "one_diag", "smart_one_diag", "one_triu", "all_diag")
PROBES = 32
"""The number of vectors that the norm's power iteration starts from: the source's choice for float32."""
LARGEST_TURN = 1 / 8
"""The longest Procrustes step: a rotation by 1/8, truncated after the second order, is orthogonal to within 1e-4."""


def memory_layout(
    shape: Sequence[int],
    max_size_triangular: int = 2048,
    min_ndim_triangular: int = 2,
    memory_save_mode: str | None = None,
) -> tuple[bool, ...]:
    """Which dimensions of a block get a dense factor; the others get a diagonal one.

    ==================  ============================================================  ==============  ==============
    memory_save_mode    dense                                                         (1024, 128)     (128, 128)
    ==================  ============================================================  ==============  ==============
    ``None``            every dimension                                               both            both
    one_diag            all but the largest                                           the second      the first
    smart_one_diag      the same, if it is larger than the second largest; else all   the second      both
    one_triu            the smallest                                                  the second      the first
    all_diag            none                                                          none            none
    ==================  ============================================================  ==============  ==============

    Among equal dimensions the last counts as the largest and the first as the smallest.

    Args:
        shape: the block's.
        max_size_triangular: dimensions larger than this are diagonal in every mode, as are those of size 1.
        min_ndim_triangular: blocks of fewer dimensions are diagonal in every mode.
        memory_save_mode: one of the table.

    Raises:
        OptionError: the mode does not exist.
    """
    if memory_save_mode not in MEMORY_SAVE_MODES:
        raise OptionError(f"memory_save_mode={memory_save_mode!r} is not one of {', '.join(map(repr, MEMORY_SAVE_MODES))}.")
    dims = range(len(shape))
    if memory_save_mode == "all_diag" or len(shape) < max(min_ndim_triangular, 1):
        return (False,) * len(shape)
    largest = max(dims, key=lambda i: (shape[i], i))
    smallest = min(dims, key=lambda i: (shape[i], i))
    wanted = {
        None: set(dims),
        "one_diag": set(dims) - {largest},
        "smart_one_diag": set(dims) - ({largest} if _stands_out(shape) else set()),
        "one_triu": {smallest},
    }[memory_save_mode]
    return tuple(i in wanted and 1 < shape[i] <= max_size_triangular for i in dims)


def _stands_out(shape: Sequence[int]) -> bool:
    """Whether one dimension is larger than all others."""
    return len(shape) > 1 and sorted(shape)[-1] > sorted(shape)[-2]


def begin(factors: Sequence[Tensor], where: Tensor, scale: Tensor) -> list[Tensor]:
    """The factors; in the blocks that ``where`` selects, multiples of the identity whose product is ``scale``.

    ``where`` and ``scale`` are ``[B]``.
    """
    share = scale ** (1 / len(factors))
    begun = []
    for q in factors:
        one = torch.ones_like(q[0]) if q.ndim == 2 else torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
        begun.append(torch.where(_per_block(where, q), _per_block(share, q) * one, q))
    return begun


def precondition(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    r""":math:`P x`: :math:`Q_i^T Q_i` applied along each dimension i of a stack ``x`` ``[B, n_0, ..., n_{d-1}]``."""
    for i, q in enumerate(factors):
        rows = _rows(x, i)
        if q.ndim == 2:
            rows = (q * q)[..., None] * rows
        elif rows.shape[-1] < q.shape[-1]:
            rows = q.mT @ (q @ rows)
        else:  # the n_i^3 of the product are cheaper here
            rows = (q.mT @ q) @ rows
        x = _unrows(rows, x, i)
    return x


def second_moments(x: Tensor, i: int, dense: bool) -> Tensor:
    r""":math:`\sum x_{\dots a \dots} x_{\dots b \dots}` over all dimensions but i, ``[B, n_i, n_i]``, or its diagonal."""
    rows = _rows(x, i)
    return rows @ rows.mT if dense else (rows * rows).sum(-1)


def _rows(x: Tensor, i: int) -> Tensor:
    """``x`` with dimension i of its blocks as the rows of matrices ``[B, n_i, numel / n_i]``."""
    return x.movedim(i + 1, 1).flatten(2) if x.ndim > 2 else x[..., None]


def _unrows(rows: Tensor, like: Tensor, i: int) -> Tensor:
    """The inverse of :func:`_rows`, for a stack of ``like``'s shape."""
    return rows.reshape(like.movedim(i + 1, 1).shape).movedim(1, i + 1)


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
    tiny = torch.finfo(a.dtype).tiny
    largest = a.abs().amax((-2, -1))
    a = a / (largest + tiny)[:, None, None]
    j = torch.linalg.vector_norm(a, dim=-1).argmax(-1)
    longest = a.take_along_dim(j[:, None, None], 1)
    v = longest + torch.sign((longest * start).sum(-1, keepdim=True)) * start
    for _ in range(iterations):
        v = v @ a
        v = v / (torch.linalg.vector_norm(v, dim=-1, keepdim=True) + tiny)
        v = v @ a
    bound: Tensor = largest * torch.linalg.vector_norm(v, dim=-1).amax(-1)
    return bound


def procrustes(q: Tensor, start: Tensor, iterations: int = 2) -> Tensor:
    r"""One step that rotates each matrix of ``q``, ``[B, n, n]``, towards the symmetric one with the same :math:`Q^T Q`.

    .. math::
        R = \frac{Q^T - Q}{\lVert Q^T - Q \rVert} \qquad Q \leftarrow Q + a R Q + \tfrac{a^2}{2} R R Q \qquad
        a = \min\!\left(\tfrac18,\; \frac{\mathrm{tr}(R Q)}{-\mathrm{tr}(R R Q)}\right)

    which is :math:`\exp(aR) Q` to second order, with the a that makes :math:`\mathrm{tr}(Q)` largest. If
    :math:`\mathrm{tr}(RRQ) \ge 0` the trace grows with a, and a is 1/8. ``start`` and ``iterations`` are
    :func:`norm_bound`'s.
    """
    r = q.mT - q
    r = r / (norm_bound(r, start, iterations) + torch.finfo(q.dtype).tiny)[:, None, None]
    rq = r @ q
    rrq = r @ rq
    gain, curvature = trace(rq), trace(rrq)
    a = torch.where(curvature < 0, (-gain / curvature).clamp(max=LARGEST_TURN), LARGEST_TURN)[:, None, None]
    return q + a * (rq + 0.5 * a * rrq)


def trace(a: Tensor) -> Tensor:
    """The traces of a stack of matrices, ``[B]``."""
    return a.diagonal(dim1=-2, dim2=-1).sum(-1)


def pro_update(
    g: Tensor,
    factors: Sequence[Tensor],
    bounds: Sequence[Tensor],
    *,
    lr: Number,
    beta: Number,
    probe: Callable[[Tensor], Tensor],
    iterations: int = 2,
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Fit the factors so that they whiten ``g``: the rule Q0.5EQ1.5, or PRO.

    .. math::
        T = \mathrm{contract}_i(Pg, Pg) \qquad t = \mathrm{numel} / n_i \qquad
        \ell = \lVert T \rVert + t \qquad L_i \leftarrow \max(\beta L_i + (1 - \beta)\,\ell,\; \ell) \\
        Q_i \leftarrow Q_i - \frac{\mathrm{lr}}{L_i} (T Q_i - t\, Q_i)
        \qquad\text{and, if it is dense, } Q_i \leftarrow \mathrm{procrustes}(Q_i)

    For a diagonal factor :math:`T` is a diagonal too, and its norm the largest element.

    Args:
        g: the dampened gradients or momenta, ``[B, *shape]``.
        factors: one for each dimension.
        bounds: the running :math:`L_i`, each ``[B]``, 0 at first.
        lr: the factors' learning rate, in [0, 1].
        beta: the decay of :math:`L_i`, in [0, 1).
        probe: draws standard normal numbers of its argument's shape; called once for each dense factor.
        iterations: of :func:`norm_bound`.

    Returns:
        The new factors, balanced, and the new bounds.
    """
    pg = precondition(g, factors)
    fitted, smooth = [], []
    for i, (q, bound) in enumerate(zip(factors, bounds, strict=True)):
        dense, n = q.ndim == 3, q.shape[-1]
        moments, t = second_moments(pg, i, dense), pg[0].numel() / n
        if dense:
            start = probe(g.new_empty(len(g), PROBES, n))
            norm = norm_bound(moments, start, iterations)
        else:
            norm = moments.amax(-1)
        bound = torch.maximum(beta * bound + (1 - beta) * (norm + t), norm + t)
        q = q - _per_block(lr / bound, q) * ((moments @ q if dense else moments * q) - t * q)
        fitted.append(procrustes(q, start, iterations) if dense else q)
        smooth.append(bound)
    return balance(fitted), smooth


def balance(factors: Sequence[Tensor]) -> list[Tensor]:
    """Scale the factors of each block to the same largest element, by numbers whose product is 1, so that P does not change.

    Without it one factor may grow as another shrinks, until both leave the range of their dtype. Factors of zeros are kept.
    """
    tiny = torch.finfo(factors[0].dtype).tiny
    logs = [q.abs().flatten(1).amax(-1).clamp(min=tiny).log() for q in factors]
    mean = torch.stack(logs).mean(0)
    return [q * _per_block((mean - log).exp(), q) for q, log in zip(factors, logs, strict=True)]


def _per_block(numbers: Tensor, like: Tensor) -> Tensor:
    """One number for each block, ``[B]``, in a shape that broadcasts against a stack such as ``like``."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def kept_where_finite(old: Sequence[Tensor], new: Sequence[Tensor]) -> list[Tensor]:
    """The new tensors, ``[B, ...]`` each, but all old ones in blocks where a product overflowed."""
    finite = torch.stack([q.isfinite().reshape(len(q), -1).all(1) for q in new]).all(0)
    return [torch.where(finite.view(-1, *[1] * (q.ndim - 1)), q, before) for before, q in zip(old, new, strict=True)]


def whitening_scale(x: Tensor, dampening: Number) -> Tensor:
    r"""The s whose :math:`s^2 x` has elements of about size 1, ``[B]`` in float64; 0 where x is 0.

    .. math:: s = \left(\mathrm{mean}(x^4) + \mathrm{dampening}^4\right)^{-1/8}

    The source's first guess of a preconditioner's scale; dampening keeps :math:`s^2` below its inverse.
    """
    # Squares in the compute dtype, their sum in float64: the fourth power of 1e-10 is outside float32's range.
    fourth = torch.linalg.vector_norm(x.square().flatten(1), dim=-1, dtype=torch.float64).square() / math.prod(x.shape[1:])
    return torch.where(fourth > 0, (fourth + dampening**4) ** -0.125, 0.0)
