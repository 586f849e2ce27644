r"""float32 matrices in two float16 parts, :math:`x = (x_1 + x_2) / s`; see :mod:`hbcore.rules.products`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hbcore.rules.launching import has_triton
from hbcore.rules.parts import EXPONENTS, Layout, Parts, views

MOST = 2**15
"""Kernels take stacks of fewer matrices: two stacks are a dimension of a grid, which a GPU limits to 2^16."""


class Halved:
    """Matrices whose float16 parts are made for the first product that needs them; see :meth:`Products.prepared`.

    Args:
        whole: the matrices, float32 ``[B, ...]``, contiguous.
        made: where their parts are kept, once they are made.
        turned: whether this is the transpose.
    """

    __slots__ = ("made", "turned", "whole")

    def __init__(self, whole: Tensor, made: list[Parts], turned: bool = False) -> None:
        self.whole, self.made, self.turned = whole, made, turned

    @property
    def shape(self) -> torch.Size:
        return (self.whole.mT if self.turned else self.whole).shape

    @property
    def ndim(self) -> int:
        return self.whole.ndim

    @property
    def mT(self) -> Halved:
        return Halved(self.whole, self.made, not self.turned)

    def reshape(self, *shape: int) -> Halved:
        """The same memory in another shape; not of a transpose."""
        return Halved(self.whole.view(shape), self.made)

    @property
    def layout(self) -> Layout | None:
        """How the parts lie in memory; None if they are not made, or made for another shape."""
        if not self.made:
            return None
        layout, shape = self.made[0].layout, self.whole.shape
        return layout if layout.run in (shape[-1], shape[-2] * shape[-1]) else None

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The high parts, the low ones, both of this shape, and the scales."""
        shape = self.whole.shape
        layout = self.layout
        if layout is None:
            layout = Layout(shape[-2] * shape[-1], False)
            make([(self, layout)])
        [made] = self.made
        high, low = (made.view(view) for view in views(shape, layout, self.turned))
        return high, low, made.scales(len(self.whole))


def halved(x: Tensor | Halved) -> Halved:
    """A stack, or its transpose, as it lies in memory."""
    if isinstance(x, Halved):
        return x
    if x.is_contiguous():
        return Halved(x, [])
    turned = x.mT
    return Halved(turned, [], True) if turned.is_contiguous() else Halved(x.contiguous(), [])


def make(stacks: Sequence[tuple[Halved, Layout]], together: bool = False) -> None:
    """Make the parts of one stack or two, of as many matrices, in one pass.

    Args:
        stacks: each, and how its parts are to lie.
        together: they may share their memory, because no product after this one needs them.
    """
    if has_kernels(stacks[0][0].whole) and stacks[-1][0].whole.numel():
        made = kernels().split([stack.whole for stack, _ in stacks], tuple([layout for _, layout in stacks]), together)
    else:
        made = [_parts(stack.whole, layout) for stack, layout in stacks]
    for (stack, _), its in zip(stacks, made, strict=True):
        stack.made[:] = [its]


def _parts(x: Tensor, layout: Layout) -> Parts:
    memory, scales = parts(x, "lh" if layout.low_first else "hl", 2 if layout.run == x.shape[2] else 1)
    return Parts(memory.view(-1), 0, scales.view(-1), 0, layout)


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
    return x.is_cuda and x.numel() > 0 and x.shape[0] < MOST and has_triton()


@lru_cache(maxsize=1)
def kernels() -> Any:
    """:mod:`hbcore.rules.products_kernel`. Triton is slow to import, and not everywhere."""  # asked at each product
    from hbcore.rules import products_kernel

    return products_kernel
