"""How a parameter of any shape is viewed as stacks of matrices. Pure functions of shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, product
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """A part of a parameter: a run of its elements in row-major order, or a region of it.

    Attributes:
        start: the index of the first element.
        batch: how many consecutive blocks of ``shape`` the run is; 1 for a region.
        shape: of one block.
        whole: for a region, the shape that the parameter is viewed as.
        corner: for a region, the index of its first element along each dimension of ``whole``.
    """

    start: int
    batch: int
    shape: tuple[int, ...]
    whole: tuple[int, ...] = ()
    corner: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.batch * math.prod(self.shape)

    def of(self, parameter: Tensor) -> Tensor:
        """This part of a contiguous tensor of the parameter's elements, as a view ``[batch, *shape]``."""
        if not self.whole:
            return parameter.view(-1)[self.start : self.start + self.numel].view(self.batch, *self.shape)
        region = tuple(slice(first, first + n) for first, n in zip(self.corner, self.shape, strict=True))
        return parameter.view(self.whole)[region].unsqueeze(0)


def grid_view(shape: Sequence[int], size: int, merge_dims: bool | int = True) -> tuple[Block, ...]:
    """Cut a parameter along every dimension into pieces of ``size``, the last of which may be shorter.

    Args:
        shape: the parameter's shape.
        size: the longest side of a block.
        merge_dims: how dimensions are merged first, see :func:`matrix_view`.

    Returns:
        The blocks, in row-major order of the grid; one run if nothing is cut.
    """
    whole = merged(tuple(shape), merge_dims)
    if all(n <= size for n in whole):
        return (Block(0, 1, whole),)
    steps = [math.prod(whole[i + 1 :]) for i in range(len(whole))]
    blocks = []
    for corner in product(*(range(0, n, size) for n in whole)):
        start = sum(first * step for first, step in zip(corner, steps, strict=True))
        blocks.append(Block(start, 1, tuple(min(size, n - c) for c, n in zip(corner, whole, strict=True)), whole, corner))
    return tuple(blocks)


def matrix_view(
    shape: Sequence[int], merge_dims: bool | int = True, split: Sequence[int] = (), batch_dims: int = 0
) -> tuple[Block, ...]:
    """Cut a parameter into stacks of blocks without moving elements.

    ============================  ==================================  ==========================================
    parameter                     arguments                           blocks
    ============================  ==================================  ==========================================
    linear ``(o, i)``             the defaults                        one ``(o, i)``
    convolution ``(o, i, h, w)``  the defaults                        one ``(o, i h w)``
    experts ``(e, o, i)``         ``batch_dims=1``                    ``e`` of ``(o, i)``
    fused q, k, v ``(3 d, d)``    ``split=(d, d, d)``                 three of ``(d, d)``
    the same with fewer k, v      ``split=(d, e, e)``                 one of ``(d, d)``, two of ``(e, d)``
    convolution                   ``merge_dims=False``                one ``(o, i, h, w)``
    convolution ``(64, 64, 3, 3)``  ``merge_dims=256``                one ``(64, 64, 9)``
    ============================  ==================================  ==========================================

    Args:
        shape: the parameter's shape.
        merge_dims: True merges all dimensions after the first; an integer merges them from the last one backwards while their
            product does not exceed it, and drops dimensions of size 1; False merges none.
        split: the number of rows (of the first dimension after the batch) of each block; must add up to all rows.
        batch_dims: the number of leading dimensions that index blocks.

    Returns:
        The blocks; consecutive blocks of equal shape share a run.

    Raises:
        ValueError: ``split`` does not add up, or there are fewer dimensions than ``batch_dims``.
    """
    shape = tuple(shape)
    if batch_dims > len(shape):
        raise ValueError(f"batch_dims={batch_dims} exceeds the dimensions of a parameter of shape {shape}")
    count, inner = math.prod(shape[:batch_dims]), shape[batch_dims:]
    if not split:
        return (Block(0, count, merged(inner, merge_dims)),)
    if not inner or sum(split) != inner[0]:
        raise ValueError(f"split={tuple(split)} does not add up to the {inner[0] if inner else 0} rows of {shape}")
    blocks: list[Block] = []
    for i in range(count):
        start = i * math.prod(inner)
        for rows in split:
            block_shape = merged((rows, *inner[1:]), merge_dims)
            if blocks and blocks[-1].shape == block_shape:
                blocks[-1] = blocks[-1]._replace(batch=blocks[-1].batch + 1)
            else:
                blocks.append(Block(start, 1, block_shape))
            start += rows * math.prod(inner[1:])
    return tuple(blocks)


def covers(blocks: Sequence[Block], shape: Sequence[int]) -> bool:
    """Whether blocks are a parameter of ``shape``: they follow one another, or are regions of one view that do not overlap."""
    if not any(b.whole for b in blocks):
        ends = [0, *accumulate(b.numel for b in blocks)]
        return [b.start for b in blocks] == ends[:-1] and ends[-1] == math.prod(shape)
    whole = blocks[0].whole
    sides = [[range(c, c + n) for c, n in zip(b.corner, b.shape, strict=False)] for b in blocks]
    inside = all(
        b.whole == whole and b.batch == 1 and len(some) == len(whole) == len(b.shape)
        and all(r.start >= 0 and r.stop <= n for r, n in zip(some, whole, strict=True))
        for b, some in zip(blocks, sides, strict=True)
    )  # fmt: skip
    return inside and math.prod(whole) == math.prod(shape) and _tile(sides, whole)


def _tile(boxes: Sequence[Sequence[range]], whole: Sequence[int]) -> bool:
    """Whether boxes cover ``whole`` once: counted on the grid of all their edges, which has a cell for each box of a grid."""
    edges = [sorted({0, n, *(e for box in boxes for e in (box[d].start, box[d].stop))}) for d, n in enumerate(whole)]
    places = [{edge: i for i, edge in enumerate(along)} for along in edges]
    count = torch.zeros([len(along) - 1 for along in edges], dtype=torch.int32, device="cpu")
    for box in boxes:
        count[tuple(slice(place[r.start], place[r.stop]) for place, r in zip(places, box, strict=True))] += 1
    return bool((count == 1).all())


def merged(shape: Sequence[int], merge_dims: bool | int) -> tuple[int, ...]:
    """``shape`` with dimensions merged as in :func:`matrix_view`."""
    if merge_dims is True:
        return (shape[0], math.prod(shape[1:])) if len(shape) > 2 else tuple(shape)
    if merge_dims is False:
        return tuple(shape)
    joined: list[int] = []
    for size in (n for n in reversed(shape[1:]) if n != 1):
        if joined and joined[-1] * size <= merge_dims:
            joined[-1] *= size
        else:
            joined.append(size)
    return (*shape[:1], *reversed(joined))
