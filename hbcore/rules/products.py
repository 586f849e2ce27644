r"""Products of float32 matrices at a chosen precision, for rules of :attr:`Domain.MATRIX`; ``c.products`` is one of them.

============  =====================================================================================================
``"ieee"``    float32 multiplications and sums
``"split"``   float32 as two scaled float16 parts, multiplied on tensor cores: as exact, four times as fast on an H100
``"tf32"``    TensorFloat-32, ten bits of mantissa: for gradients of full rank only
============  =====================================================================================================

A factor is :math:`x = (x_1 + x_2) / s` with float16 :math:`x_1` and :math:`x_2` and a power of two ``s`` for each matrix, which
leaves an error of :math:`2^{-22}` of an element and :math:`2^{-37}` of the largest. A product of two needs three of float16,

.. math:: s\,r\,X Y = X_1 Y_1 + X_1 Y_2 + X_2 Y_1 + O(2^{-22}),

which are one product of three times the depth; Ootomo and Yokota 2022 (arXiv:2203.03341), with the parts side by side.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

PRECISIONS = ("ieee", "split", "tf32")
"""What ``matmul_precision`` may be."""

EXPONENT = 13
"""The largest element of a scaled matrix is below two to this power: float16 reaches 2^16, and its smallest step is 2^-24."""

DEPTH = 1024
"""How many float16 products are summed at once. Tensor cores drop bits from long sums: at 3,072 1.5e-5 of a covariance."""


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
        (x, s), (y, r) = parts(a, "hhl", 2), parts(b, "hlh", 1)
        return _product(x, y).mul_(_inverse(s, r))

    def averaged(self, mean: Tensor, x: Tensor, decay: float) -> Tensor:
        if x.dtype != torch.float32:
            return Exact().averaged(mean, x, decay)
        n = x.shape[1]
        both, s = parts(x, "hl", 1)
        total = _product(both[:, :n], both.mT)  # of the other half, the low parts' own product is below float32's precision
        total = total[:, :, :n] + total[:, :, n:] + total[:, :, n:].mT
        return (mean * decay).add_(total.mul_((1 - decay) * _inverse(s, s)))


IEEE: Products = Exact()


def parts(x: Tensor, order: str, dim: int) -> tuple[Tensor, Tensor]:
    """The float16 parts of ``x`` ``[B, m, n]``, several times as long along ``dim``, and the scale ``[B, 1, 1]``.

    Args:
        x: float32; may be a transposed view.
        order: ``h`` and ``l``, the high and the low part, as they follow one another.
        dim: 1 or 2.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=(1, 2), keepdim=True)
    exponent = (EXPONENT - torch.frexp(largest)[1]).clamp(max=126)  # float32's; even denormals are multiples of 2^-24 then
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    if not x.is_contiguous() and x.mT.is_contiguous():
        return _laid_out(x.mT, scale, order, 3 - dim).mT, scale
    return _laid_out(x.contiguous(), scale, order, dim), scale


def _inverse(s: Tensor, r: Tensor) -> Tensor:
    """What to multiply a product of scaled factors by. float64: two scales together may be outside float32's range."""
    return (s.double() * r.double()).reciprocal()


def _laid_out(x: Tensor, scale: Tensor, order: str, dim: int) -> Tensor:
    """The parts of a contiguous ``x``."""
    if x.is_cuda:
        from hbcore.rules import products_kernel  # Triton is slow to import, and not everywhere

        return products_kernel.laid_out(x, scale, order, dim)
    scaled = x * scale
    high = scaled.half()
    low = (scaled - high.float()).half()
    return torch.cat([high if which == "h" else low for which in order], dim=dim)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``[B, m, k] @ [B, k, n]`` of float16, summed in float32."""
    total: Tensor | None = None
    for k in range(0, a.shape[2], DEPTH):
        x, y = a[:, :, k : k + DEPTH], b[:, k : k + DEPTH]
        piece = torch.bmm(x, y, out_dtype=torch.float32) if x.is_cuda else torch.bmm(x.float(), y.float())
        total = piece if total is None else total.add_(piece)
    assert total is not None
    return total
