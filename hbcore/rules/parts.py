"""Where the float16 parts of float32 matrices lie in memory; see :mod:`hbcore.rules.halves`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

EXPONENTS = (13, -126, 126)
"""The largest element of a scaled matrix is below two to the first: float16 reaches 2^16, and its smallest step is 2^-24. The
scale's own exponent has float32's range; even denormals are multiples of 2^-24 at the largest."""


class Layout(NamedTuple):
    """How the parts of a matrix share memory.

    Attributes:
        run: after so many elements of one part come as many of the other: the matrix's columns, or all of its elements.
        low_first: whether the low part comes first.
    """

    run: int
    low_first: bool


class View(NamedTuple):
    """What :meth:`torch.Tensor.as_strided` takes, counted from where a stack's parts begin."""

    size: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: int


class Parts(NamedTuple):
    """The float16 parts of a stack.

    Attributes:
        memory: float16, 1-d, perhaps of other stacks too.
        first: where they begin there.
        numbers: float32, 1-d, among which the scales of the matrices are.
        first_scale: where those begin.
        layout: how they lie in memory.
    """

    memory: Tensor
    first: int
    numbers: Tensor
    first_scale: int
    layout: Layout

    def view(self, view: View) -> Tensor:
        """Some of them, float16 ``[B, m, n]``."""
        return self.memory.as_strided(view.size, view.stride, self.first + view.offset)

    def scales(self, count: int) -> Tensor:
        """The scales of the ``count`` matrices, ``[B]``."""
        return self.numbers.as_strided((count,), (1,), self.first_scale)


@lru_cache(maxsize=1024)
def views(shape: torch.Size, layout: Layout, turned: bool) -> tuple[View, View]:
    """The high parts and the low ones of matrices of a shape, transposed if ``turned``."""
    count, rows, columns = shape
    row = columns if layout.run == rows * columns else 2 * columns
    size, stride = (count, rows, columns), (2 * rows * columns, row, 1)
    if turned:
        size, stride = (count, columns, rows), (2 * rows * columns, 1, row)
    first, second = View(size, stride, 0), View(size, stride, layout.run)
    return (second, first) if layout.low_first else (first, second)
