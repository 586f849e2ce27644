r"""Products of float32 matrices at a chosen precision, for rules of :attr:`Domain.MATRIX`; ``c.products`` is one of them.

============  =====================================================================================================
``"ieee"``    as exact as float32 multiplications and sums, or more so
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

from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from hbcore.rules.halves import Halved, halved, has_kernels, kernels
from hbcore.rules.parts import EXPONENTS, Parts
from hbcore.rules.split_product import product

PRECISIONS = ("ieee", "split", "tf32")
"""What ``matmul_precision`` may be."""

SQUARES = 384
"""How many products of high parts are summed at once in second moments, whose terms do not cancel: 1.5e-5 off at 9,216."""


Operand: TypeAlias = "Tensor | Halved"
"""A factor, or what :meth:`Products.prepared` made of one."""


class Weights(NamedTuple):
    """What the rows or the columns of a product are multiplied by.

    Attributes:
        numbers: for each matrix as many as it has rows or columns, ``[B, m]`` or ``[B, n]``.
        columns: whether they are the columns'.
    """

    numbers: Tensor
    columns: bool

    def apply(self, product: Tensor) -> Tensor:
        """``product`` ``[B, m, n]``, multiplied in place."""
        return product.mul_(self.numbers[:, None, :] if self.columns else self.numbers[:, :, None])


class Products(Protocol):
    """How a matrix rule multiplies. Everything is a stack ``[B, m, k]``; pure functions.

    Attributes:
        overwrites: whether ``out`` of :meth:`matmul` may be memory of a factor.
    """

    overwrites: bool

    @property
    def finest(self) -> Products:
        """More exact products where there are some, of :class:`Split` float32's own: for a few products whose errors add up."""

    def matmul(self, a: Operand, b: Operand, out: Tensor | None = None, weights: Weights | None = None) -> Tensor:
        """``a @ b`` for ``[B, m, k]`` and ``[B, k, n]``, either of which may be a transposed view.

        It is written to ``out``, ``[B, m, n]`` and contiguous, if given: memory of neither factor, unless ``overwrites``.
        ``weights`` multiply its rows or columns.
        """

    def squared(self, x: Operand) -> Tensor:
        """``x @ x.mT``, ``[B, m, m]``, for ``[B, m, k]``, which may be a transposed view. What overflows is not finite."""

    def averaged(self, mean: Tensor, x: Operand, decay: float, out: Tensor | None = None) -> Tensor:
        r""":math:`\beta M + (1 - \beta) X X^\top` for ``[B, m, m]``, symmetric, and ``[B, m, k]``; ``decay`` is :math:`\beta`.

        Rows whose squares overflow, or all rows of their matrix, count as zeros: an average would never forget them. ``out`` is
        memory for the result, contiguous, if given; it may be ``mean``'s. It need not be used.
        """

    def prepared(self, x: Tensor) -> Operand:
        """``x`` ``[B, ...]``, for several products: what they have in common is computed once."""


class Exact:
    """In the dtype of the arguments, as torch multiplies."""

    overwrites = False

    @property
    def finest(self) -> Products:
        return self

    def matmul(self, a: Operand, b: Operand, out: Tensor | None = None, weights: Weights | None = None) -> Tensor:
        product = torch.bmm(whole(a), whole(b), out=out)
        return product if weights is None else weights.apply(product)

    def squared(self, x: Operand) -> Tensor:
        x = whole(x)
        return torch.bmm(x, x.mT)

    def averaged(self, mean: Tensor, x: Operand, decay: float, out: Tensor | None = None) -> Tensor:
        x = whole(x)
        return _finite(torch.baddbmm(mean, x, x.mT, beta=decay, alpha=1 - decay), mean, decay)

    def prepared(self, x: Tensor) -> Operand:
        return x


class Triple(Exact):
    """float32 in three bfloat16 parts, which have all of its bits; other dtypes as :class:`Exact` has them.

    See :mod:`hbcore.rules.square_kernel`. Devices without kernels multiply as torch does.
    """

    def matmul(self, a: Operand, b: Operand, out: Tensor | None = None, weights: Weights | None = None) -> Tensor:
        a, b = whole(a), whole(b)
        if a.dtype != torch.float32 or not (has_kernels(a) and b.numel()):
            return super().matmul(a, b, out, weights)
        from hbcore.rules import float32_kernel  # Triton is slow to import, and not everywhere

        product = float32_kernel.product(a, b, out)
        return product if weights is None else weights.apply(product)

    def squared(self, x: Operand) -> Tensor:
        x = whole(x)
        return _square_kernel(x) if x.dtype == torch.float32 and has_kernels(x) else super().squared(x)

    def averaged(self, mean: Tensor, x: Operand, decay: float, out: Tensor | None = None) -> Tensor:
        x = whole(x)
        if x.dtype != torch.float32 or not has_kernels(x):
            return super().averaged(mean, x, decay)
        return _square_kernel(x, mean=mean, decay=decay, out=out)


class Split:
    """float32 in two float16 parts; other dtypes as :class:`Exact` has them.

    Devices without products of float16 with a float32 result multiply the same parts as float32, which is slower than ``ieee``.

    Args:
        finest: products of float32.
    """

    overwrites = True  # what is multiplied are the parts

    def __init__(self, finest: Products | None = None) -> None:
        self._finest = finest

    @property
    def finest(self) -> Products:
        return IEEE if self._finest is None else self._finest

    def matmul(self, a: Operand, b: Operand, out: Tensor | None = None, weights: Weights | None = None) -> Tensor:
        left, right = halved(a), halved(b)
        if left.whole.dtype != torch.float32 or not (left.whole.numel() and right.whole.numel()):
            made = Exact().matmul(a, b, None, weights)
            return made if out is None else out.copy_(made)
        total, x, y = product(left, right, out, together=left is not a and right is not b)
        return _unscaled(total, x, y, out, weights)

    def squared(self, x: Operand) -> Tensor:
        return Exact().squared(x) if isinstance(x, Tensor) and x.dtype != torch.float32 else self._squared(x)

    def averaged(self, mean: Tensor, x: Operand, decay: float, out: Tensor | None = None) -> Tensor:
        if isinstance(x, Tensor) and x.dtype != torch.float32:
            return Exact().averaged(mean, x, decay)
        return self._squared(x, mean, decay, out)

    def prepared(self, x: Tensor) -> Operand:
        return Halved(x.contiguous(), []) if x.dtype == torch.float32 else x

    def _squared(self, x: Operand, mean: Tensor | None = None, decay: float = 0.0, out: Tensor | None = None) -> Tensor:
        high, low, scales = halved(x).parts()
        if has_kernels(high):
            return _square_kernel(high, low, scales, mean, decay, EXPONENTS[0], out)
        cross, k = torch.bmm(high.float(), low.float().mT), high.shape[2]
        total = cross + cross.mT
        for piece in (high[:, :, i : i + SQUARES].float() for i in range(0, k, SQUARES)):
            total.baddbmm_(piece, piece.mT)
        inverse = (1 / scales)[:, None, None]
        total = total.mul_(inverse).mul_(inverse)
        return total if mean is None else _finite((mean * decay).add_(total, alpha=1 - decay), mean, decay)


IEEE: Products = Exact()


def whole(x: Operand) -> Tensor:
    """The matrices themselves."""
    return x if isinstance(x, Tensor) else x.whole.mT if x.turned else x.whole


def _square_kernel(*arguments: Any, **more: Any) -> Tensor:
    from hbcore.rules import square_kernel

    return square_kernel.squared(*arguments, **more)


def _finite(new: Tensor, mean: Tensor, decay: float) -> Tensor:
    """An average; without what was added in matrices where squares overflowed, which the diagonal shows."""
    finite = new.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return torch.where(finite[:, None, None], new, mean * decay)


def _unscaled(total: Tensor, x: Parts, y: Parts, out: Tensor | None, weights: Weights | None) -> Tensor:
    """A product ``[B, m, n]`` divided by the scales of its factors and weighted, in place or written to ``out``."""
    into = total if out is None else out
    if not has_kernels(total):
        s, r = x.scales(len(total)), y.scales(len(total))
        torch.mul(total, (1 / (s.double() * r.double()))[:, None, None], out=into)
        return into if weights is None else weights.apply(into)
    divided: Tensor = kernels().unscale(total, x, y, into, *(weights or (None, False)))
    return divided
