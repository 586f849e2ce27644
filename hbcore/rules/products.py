r"""Products of float32 matrices at a chosen precision, for rules of :attr:`Domain.MATRIX`; ``c.products`` is one of them.

============  =====================================================================================================
``"ieee"``    float32 multiplications and sums
``"split"``   float32 as two scaled float16 parts, multiplied on tensor cores: as exact, four times as fast on an H200
``"tf32"``    TensorFloat-32, ten bits of mantissa: for gradients of full rank only
============  =====================================================================================================

A factor is :math:`x = (x_1 + x_2) / s` with float16 :math:`x_1` and :math:`x_2` and a power of two ``s`` for each matrix, which
leaves an error of :math:`2^{-22}` of an element and :math:`2^{-37}` of the largest. A product of two needs three of float16,

.. math:: s\,r\,X Y = X_1 Y_1 + X_1 Y_2 + X_2 Y_1 + O(2^{-22}),

Ootomo and Yokota 2022 (arXiv:2203.03341). The parts lie side by side, so that the two small ones are one product of twice the
depth, and the first is added to it by the same call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hbcore.rules.launching import has_triton

PRECISIONS = ("ieee", "split", "tf32")
"""What ``matmul_precision`` may be."""

EXPONENTS = (13, -126, 126)
"""The largest element of a scaled matrix is below two to the first: float16 reaches 2^16, and its smallest step is 2^-24. The
scale's own exponent has float32's range; even denormals are multiples of 2^-24 at the largest."""

DEPTH = 768
"""How many products of high parts are summed at once. Tensor cores drop bits from long sums: an H200 is 4e-6 off at 2,304."""

SQUARES = 384
"""The same for second moments, whose terms do not cancel: 1.5e-5 off at 9,216."""

SMALL = 4608
"""The same for products with low parts."""


MOST = 2**15
"""Kernels take stacks of fewer matrices: two stacks are a dimension of a grid, which a GPU limits to 2^16."""

WIDENS = hasattr(torch.ops.aten.baddbmm, "dtype_out")
"""Whether torch multiplies float16 to a float32 result, as releases since 2.8 do."""


class Products(Protocol):
    """How a matrix rule multiplies. Everything is a stack ``[B, m, k]``; pure functions."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` for ``[B, m, k]`` and ``[B, k, n]``, either of which may be a transposed view."""

    def averaged(self, mean: Tensor, x: Tensor, decay: float) -> Tensor:
        r""":math:`\beta M + (1 - \beta) X X^\top` for ``[B, m, m]`` and ``[B, m, k]``; ``decay`` is :math:`\beta`."""


class Exact:
    """In the dtype of the arguments, as torch multiplies."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a, b)

    def averaged(self, mean: Tensor, x: Tensor, decay: float) -> Tensor:
        return torch.baddbmm(mean, x, x.mT, beta=decay, alpha=1 - decay)


class Split:
    """float32 in two float16 parts; other dtypes as :class:`Exact` has them.

    Devices without products of float16 with a float32 result multiply the same parts as float32, which is slower than ``ieee``.
    """

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        if a.dtype != torch.float32:
            return torch.bmm(a, b)
        k = a.shape[2]
        small = [2 * k] if 2 * k <= SMALL else [k, k]  # the products with a low part, whose own errors do not matter
        lengths = [*small, *_lengths(k, DEPTH)]
        if not (_has_kernels(a) and b.numel()):
            (x, s), (y, r) = parts(a, "lhh", 2), parts(b, "hlh", 1)
            return _product(x, y, lengths).mul_(1 / (s.double() * r.double()))  # perhaps outside float32's range
        from hbcore.rules import products_kernel  # Triton is slow to import, and not everywhere

        (a, turned_a), (b, turned_b) = _in_memory_order(a), _in_memory_order(b)
        x, y, scales = products_kernel.parts(a, b, ("lhh", "hlh"), (1 if turned_a else 2, 2 if turned_b else 1), EXPONENTS)
        product = _product(x.mT if turned_a else x, y.mT if turned_b else y, lengths)
        return products_kernel.unscale(product, scales)

    def averaged(self, mean: Tensor, x: Tensor, decay: float) -> Tensor:
        if x.dtype != torch.float32:
            return Exact().averaged(mean, x, decay)
        n, lengths = x.shape[1], _lengths(x.shape[2], SQUARES)
        # of the other half, the low parts' own product is below float32's precision
        if not _has_kernels(x):
            both, s = parts(x, "hl", 1)
            total = _product(both[:, :n], both.mT, lengths)
            total = total[:, :, :n] + total[:, :, n:] + total[:, :, n:].mT
            return (mean * decay).add_(total.mul_(1 / s).mul_((1 - decay) / s))
        from hbcore.rules import products_kernel

        x, turned = _in_memory_order(x)
        both, _, scales = products_kernel.parts(x, x, ("hl", "hl"), (2 if turned else 1,) * 2, EXPONENTS)
        both = both.mT if turned else both
        return products_kernel.combined(mean, _product(both[:, :n], both.mT, lengths), scales, decay)


IEEE: Products = Exact()


def parts(x: Tensor, order: str, dim: int) -> tuple[Tensor, Tensor]:
    """The float16 parts of ``x`` ``[B, m, n]``, several times as long along ``dim``, and the scale ``[B, 1, 1]``.

    Args:
        x: float32; may be a transposed view.
        order: ``h`` and ``l``, the high and the low part, as they follow one another.
        dim: 1 or 2.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=(1, 2), keepdim=True)
    top, *limits = EXPONENTS
    exponent = (top - torch.frexp(largest)[1]).clamp(*limits)
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    scaled = x * scale
    high = scaled.half()
    low = (scaled - high.float()).half()
    return torch.cat([high if which == "h" else low for which in order], dim=dim), scale


def _has_kernels(x: Tensor) -> bool:
    """Whether generated kernels split a stack; elsewhere torch does, in several passes."""
    return x.is_cuda and x.numel() > 0 and len(x) < MOST and has_triton()


def _lengths(k: int, most: int) -> list[int]:
    """``k`` in pieces of ``most``, the last of which may be shorter."""
    return [min(most, k - first) for first in range(0, k, most)]


def _product(a: Tensor, b: Tensor, lengths: Sequence[int]) -> Tensor:
    """``[B, m, k] @ [B, k, n]`` of float16, summed in float32 piece by piece, of these lengths."""
    total: Tensor | None = None
    first = 0
    for length in lengths:
        x, y = a.narrow(2, first, length), b.narrow(1, first, length)
        first += length
        if not (x.is_cuda and WIDENS):
            piece = torch.bmm(x.float(), y.float())
            total = piece if total is None else total.add_(piece)
        elif total is None:
            total = torch.bmm(x, y, out_dtype=torch.float32)
        else:
            torch.ops.aten.baddbmm.dtype_out(total, x, y, torch.float32, out=total)  # without the copy that a result would be
    assert total is not None
    return total


def _in_memory_order(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` or its transpose, contiguous, and whether it is the transpose."""
    turned = not x.is_contiguous() and x.mT.is_contiguous()
    return (x.mT if turned else x.contiguous()), turned
