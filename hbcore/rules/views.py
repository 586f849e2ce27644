"""How a parameter of any shape is viewed as stacks of matrices. Pure functions of shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """A run of a parameter's elements in row-major order: ``batch`` consecutive blocks of one shape."""

    start: int
    batch: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements in the run."""
        return self.batch * math.prod(self.shape)


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
