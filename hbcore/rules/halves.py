r"""float32 matrices in two float16 parts, :math:`x = (x_1 + x_2) / s`; see :mod:`hbcore.rules.products`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hbcore.rules.launching import has_triton

EXPONENTS = (13, -126, 126)
"""The largest element of a scaled matrix is below two to the first: float16 reaches 2^16, and its smallest step is 2^-24. The
scale's own exponent has float32's range; even denormals are multiples of 2^-24 at the largest."""

MOST = 2**15
"""Kernels take stacks of fewer matrices: two stacks are a dimension of a grid, which a GPU limits to 2^16."""


class Halved:
    """Matrices whose float16 parts serve several products, and are made for the first one; see :meth:`Products.prepared`.

    Args:
        whole: the matrices, float32 ``[B, ...]``, contiguous.
        made: where their parts are kept: the high and the low ones, ``[B, 2, numel]``, and the scales, ``[B]``.
        turned: whether this is the transpose.
    """

    def __init__(self, whole: Tensor, made: list[Tensor], turned: bool = False) -> None:
        self.whole, self.made, self.turned = whole, made, turned

    @property
    def shape(self) -> torch.Size:
        return (self.whole.mT if self.turned else self.whole).shape

    @property
    def mT(self) -> Halved:
        return Halved(self.whole, self.made, not self.turned)

    def reshape(self, *shape: int) -> Halved:
        """The same memory in another shape; not of a transpose."""
        return Halved(self.whole.view(shape), self.made)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The high parts, the low ones, both of this shape, and the scales."""
        if not self.made:
            self.made.extend(halves(self.whole.view(len(self.whole), 1, -1), "hl", 1))
        planes, scales = self.made
        high, low = planes.view(len(planes), 2, *self.whole.shape[1:]).unbind(1)
        return (high.mT, low.mT, scales) if self.turned else (high, low, scales)


def halves(x: Tensor, order: str, dim: int) -> tuple[Tensor, Tensor]:
    """The parts of float32 matrices ``[B, m, n]``, see :func:`parts`, and their scales ``[B]``."""
    if not has_kernels(x):
        made, scales = parts(x, order, dim)
        return made, scales.flatten()
    x, turned = in_memory_order(x)
    (made, _), (scales, _) = kernels().parts(x, x, (order, order), (3 - dim if turned else dim,) * 2, EXPONENTS)
    return made.mT if turned else made, scales


def both_halves(a: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """:func:`halves` of the factors of a product, low beside high and high upon low, in one pass."""
    if not (has_kernels(a) and b.numel()):
        return halves(a, "lh", 2), halves(b, "hl", 1)
    (a, turned_a), (b, turned_b) = in_memory_order(a), in_memory_order(b)
    (x, y), (s, r) = kernels().parts(a, b, ("lh", "hl"), (1 if turned_a else 2, 2 if turned_b else 1), EXPONENTS)
    return (x.mT if turned_a else x, s), (y.mT if turned_b else y, r)


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


def has_kernels(x: Tensor) -> bool:
    """Whether generated kernels split a stack; elsewhere torch does, in several passes."""
    return x.is_cuda and x.numel() > 0 and len(x) < MOST and has_triton()


@lru_cache(maxsize=1)
def kernels() -> Any:
    """:mod:`hbcore.rules.products_kernel`. Triton is slow to import, and not everywhere."""  # asked at each product
    from hbcore.rules import products_kernel

    return products_kernel


def in_memory_order(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` or its transpose, contiguous, and whether it is the transpose."""
    if x.is_contiguous():
        return x, False
    turned = x.mT
    return (turned, True) if turned.is_contiguous() else (x.contiguous(), False)
