r"""Kronecker-factored preconditioners on stacks of equal blocks. Pure functions; blocks are independent.

A block is a tensor of shape :math:`(n_0, \dots, n_{d-1})`; a stack of B of them is ``x``, ``[B, n_0, ..., n_{d-1}]``. Its
preconditioner is :math:`P = Q^T Q` with :math:`Q = Q_0 \otimes \dots \otimes Q_{d-1}`. Factor i is a stack of matrices
``[B, n_i, n_i]`` (dense), or of the diagonals of matrices ``[B, n_i]``. ``products`` is a rule's ``c.products``.

Sources: Li 2015, Preconditioned Stochastic Gradient Descent (arXiv:1512.04202); Pooladzandi and Li 2024, Curvature-Informed
SGD via General Purpose Lie-Group Preconditioners (arXiv:2402.11858); and the author's own implementation, psgd_torch of
October 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hb_psgd.norms import largest
from hbcore.api import Operand, OptionError, Products, bases, launching

Number: TypeAlias = "Tensor | float"

QUARTERED = 256
"""The least size of a symmetric matrix of which a quarter is not worth computing."""

MEMORY_SAVE_MODES = (None, "one_diag", "smart_one_diag", "one_triu", "all_diag")


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


def begin(factors: Sequence[Tensor], share: Tensor) -> list[Tensor]:
    """Factors plus ``share`` ``[B]`` times the identity, which starts those that are zeros."""
    return [add_identity(q.clone(), share) for q in factors]


def add_identity(factor: Tensor, share: Tensor) -> Tensor:
    """A factor plus ``share`` ``[B]`` times the identity, in place."""
    (factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)).add_(share[:, None])
    return factor


def multiply(x: Tensor, factors: Sequence[Tensor], products: Products, out: Tensor | None = None) -> Tensor:
    """Each factor applied along its dimension of a stack ``x``: :math:`Q x`, or :math:`P x` if the factors are P's.

    ``out`` is memory for the result, contiguous, which need not be used; it may be x's own.
    """
    order, other = _order(factors, products)
    for k, i in enumerate(order):
        q, place = factors[i], out if k == len(order) - 1 else None
        if q.ndim == 2:
            x = torch.mul(x, along(q, i, x), out=_into(x, k, place))
        else:
            x = bases.along(x, q.mT, i, products, _room(place, k, products), other)
    return x


def _order(factors: Sequence[Tensor], products: Products) -> tuple[list[int], Tensor | None]:
    """The dimensions in an order in which as much as possible is done in place: those of dense factors first; and for matrices
    with one diagonal factor that factor, if the product with the other one multiplies by it, too."""
    order = sorted(range(len(factors)), key=lambda i: factors[i].ndim == 2)
    if products.overwrites and len(order) == 2 and factors[order[0]].ndim == 3 and factors[order[1]].ndim == 2:
        return order[:1], factors[order[1]]
    return order, None


def _room(place: Tensor | None, done: int, products: Products) -> Tensor | None:
    """Where a product goes: not where the stack is at first, over what it reads, unless that is allowed."""
    return place if done or products.overwrites else None


def _into(x: Tensor, done: int, place: Tensor | None) -> Tensor | None:
    """Where a stack times numbers goes: to its place, or where the stack is, if it is the result of a dimension before."""
    return x if done and place is None else place


def keeps(shape: Sequence[int]) -> tuple[bool, ...]:
    """For which dimensions of a block a dense factor of P is worth keeping: where it is no larger than two blocks.

    A larger one takes longer to compute than a few preconditionings by Q save, and as much memory as the block's moments.
    """
    return tuple(n * n <= 2 * math.prod(shape) for n in shape)


def precondition(
    x: Tensor,
    factors: Sequence[Tensor],
    products: Products,
    kept: Sequence[Tensor | None] = (),
    out: Tensor | None = None,
) -> Tensor:
    r""":math:`Q^T Q x`, from the factors of Q, and of P for the dimensions where they are ``kept``; ``out`` as in
    :func:`multiply`."""
    order, other = _order(factors, products)
    square = None if other is None else other * other
    for k, i in enumerate(order):
        q, p = factors[i], kept[i] if kept else None
        place = out if k == len(order) - 1 else None
        if q.ndim == 2:
            x = torch.mul(x, along(q * q, i, x), out=_into(x, k, place))
        elif p is not None:
            x = bases.along(x, p, i, products, _room(place, k, products), square)
        elif x[0].numel() < q.shape[-1] ** 2:
            x = bases.along(bases.along(x, q.mT, i, products), q, i, products, place, square)
        else:  # the n_i^3 of the product are cheaper here
            x = bases.along(x, gram(q, products), i, products, _room(place, k, products), square)
    return x


def gram(q: Tensor, products: Products) -> Tensor:
    r"""A factor of P, :math:`Q_i^T Q_i`; of a diagonal the squares."""
    if q.ndim == 2:
        return q * q
    if q.is_cuda:
        return products.squared(q.mT)
    return symmetric(q, lambda rows, columns: products.matmul(q[:, :, rows].mT, q[:, :, columns]))


def symmetric(like: Tensor, part: Callable[[slice, slice], Tensor]) -> Tensor:
    """Symmetric matrices like ``[B, n, n]``, from ``part(rows, columns)`` of them: large ones from three of their quarters."""
    n = like.shape[-1]
    if n < QUARTERED:
        whole = part(slice(0, n), slice(0, n))
        return (whole + whole.mT).mul_(0.5)
    out, first, second = torch.empty_like(like), slice(0, n // 2), slice(n // 2, n)
    out[:, first] = part(first, slice(0, n))
    out[:, second, second] = part(second, second)
    out[:, second, first] = out[:, first, second].mT
    for half in (first, second):
        square = out[:, half, half]
        out[:, half, half] = (square + square.mT).mul_(0.5)
    return out


def second_moments(x: Operand, i: int, dense: bool, products: Products) -> Tensor:
    r""":math:`\sum x_{\dots a \dots} x_{\dots b \dots}` over all dimensions but i, ``[B, n_i, n_i]``, or its diagonal.

    ``x`` is a stack, perhaps prepared by ``products``.
    """
    count, n = x.shape[0], x.shape[i + 1]
    if not dense:
        x = x if isinstance(x, Tensor) else x.whole
        others = [d for d in range(1, x.ndim) if d != i + 1]
        if not others:
            return x.square()
        if not x.is_cuda:
            return x.square().sum(others)  # a CPU takes longer for the norm
        norms: Tensor = torch.linalg.vector_norm(x, dim=others)
        return norms.square_()  # without the squares of x, which would be written and read
    if i == len(x.shape) - 2:
        return products.squared(x.reshape(count, -1, n).mT)
    if i == 0:
        return products.squared(x.reshape(count, n, -1))
    x = x if isinstance(x, Tensor) else x.whole
    return products.squared(x.movedim(i + 1, 1).reshape(count, n, -1))


def along(numbers: Tensor, i: int, like: Tensor) -> Tensor:
    """``[B, n_i]`` in the shape that multiplies dimension i of a stack such as ``like``."""
    return numbers.view(like.shape[0], *(n if d == i else 1 for d, n in enumerate(like.shape[1:])))


def per_block(numbers: Tensor, like: Tensor) -> Tensor:
    """One number for each block, ``[B]``, in a shape that broadcasts against a stack such as ``like``."""
    return numbers.view(-1, *[1] * (like.ndim - 1))


def balance(sizes: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """What fitted factors are multiplied by before they are stored, and in which blocks they are fit to be.

    Balanced factors of a block have the same largest element; they are scaled by numbers whose product is 1, so that P does
    not change. Without it one may grow as another shrinks, until both leave the range of their dtype. Zeros are kept.

    Args:
        sizes: the largest magnitudes of the factors, ``[d, B]``.
        bounds: their new bounds, the same.

    Returns:
        ``[d, B]``, and ``[B]`` booleans: False where a product overflowed in one of the block's factors.
    """
    good = torch.maximum(sizes, bounds.abs()).amax(0) < float("inf")  # both pass NaN on
    logs = sizes.clamp(min=torch.finfo(sizes.dtype).tiny).log_()
    return (logs.mean(0) - logs).exp_(), good


def dampened(g: Tensor, noise: Tensor, dampening: Number, relative: float) -> Tensor:
    r""":math:`g + (\mathrm{dampening} + \mathrm{relative}\, |g|)\, v` for stacks ``g`` and the noise ``v``."""
    if has_kernels(g, noise):
        from hb_psgd import fitting_kernel  # Triton is slow to import, and not everywhere

        return fitting_kernel.dampened(g, noise, float(dampening), relative)
    return g.abs().mul_(relative).add_(dampening).mul_(noise).add_(g)


def has_kernels(*tensors: Tensor) -> bool:
    """Whether generated kernels take these: contiguous float32 on a GPU, not empty."""
    fit = all(t.is_cuda and t.dtype == torch.float32 and t.numel() and t.is_contiguous() for t in tensors)
    return fit and launching.has_triton()


def whitening_scale(x: Tensor, dampening: Number) -> Tensor:
    r"""The s whose :math:`s^2 x` has elements of about size 1, ``[B]``; 0 where x is 0 or not finite.

    .. math:: s = \left(\mathrm{mean}(x^4) + \mathrm{dampening}^4\right)^{-1/8}

    The source's first guess of a preconditioner's scale; dampening keeps :math:`s^2` below its inverse.
    """
    return whitening_scales([x], dampening)


def whitening_scales(xs: Sequence[Tensor], dampening: Number) -> Tensor:
    """:func:`whitening_scale` for the blocks of several stacks of one dtype, one after the other: float32 by kernels, float64
    otherwise."""
    if has_kernels(*xs):
        from hb_psgd import fitting_kernel

        return fitting_kernel.whitening_scales([*xs], float(dampening))
    d, size = float(dampening), torch.cat([largest(x) for x in xs])
    known = (size > 0) & size.isfinite()
    # The fourth powers of 1e-10 and 1e10 are outside float32's range: those of ratios to the larger of x and d are not.
    most = torch.where(known, size, 1.0).clamp(min=d)
    counts = [len(x) for x in xs]
    squares = [(x / per_block(by, x)).square_().flatten(1) for x, by in zip(xs, torch.split(most, counts), strict=True)]
    fourth = torch.cat([torch.linalg.vector_norm(x, dim=-1).double().square() / x.shape[-1] for x in squares])
    most = most.double()
    return torch.where(known, most.rsqrt() * (fourth + (d / most) ** 4) ** (-1 / 8), 0.0)
