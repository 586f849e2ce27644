"""Blocks: 32 neighbouring elements of a row, which a codec may store with one number for all of them, such as a scale.

A blockwise codec (:class:`hbcore.state.codec.BlockCodec`) sees more than one element only through the two functions here. Both
are operations of their own in a traced graph, so that each backend has its own form of them: shuffles in a Triton kernel,
an inner loop in C++, a view and a reduction in torch. Their results are exact and therefore the same on every backend.

Blocks are cut from an element's row, in the order of memory, and never cross from one row (index of dimension 0) to the next:
a tensor that is sharded by rows has whole blocks on every rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 32
"""Elements in a block."""

_library: Any = torch.library.Library("hbcore", "DEF")  # type: ignore[no-untyped-call]
_library.define("block_amax(Tensor x) -> Tensor")
_library.define("spread(Tensor blocks, Tensor like) -> Tensor")


def block_shape(shape: torch.Size) -> torch.Size | None:
    """The shape of a tensor with one entry for each block of a tensor of ``shape``; None if its rows are not made of blocks.

    The trailing dimensions that make up blocks become one: ``[64, 96]`` -> ``[64, 3]``, ``[64, 32, 3, 3]`` -> ``[64, 9]``,
    ``[64, 3, 3, 3]`` and ``[96]`` -> None.
    """
    for first in range(len(shape) - 1, 0, -1):
        inner = math.prod(shape[first:])
        if inner % BLOCK == 0:
            return torch.Size((*shape[:first], inner // BLOCK))
    return None


def block_amax(x: Tensor) -> Tensor:
    """The largest value of each block; NaN if one of them is.

    Args:
        x: a tensor that :func:`block_shape` has blocks for, or 1-d of whole blocks.

    Returns:
        A tensor of :func:`block_shape`; ``[n / 32]`` for ``[n]``.
    """
    result: Tensor = torch.ops.hbcore.block_amax(x)
    return result


def spread(blocks: Tensor, like: Tensor) -> Tensor:
    """Each block's number for each of its elements: of the shape of ``like``, whose values are not looked at."""
    result: Tensor = torch.ops.hbcore.spread(blocks, like)
    return result


def amax_in_torch(x: Tensor) -> Tensor:
    """:func:`block_amax`, by operations of torch."""
    shape = block_shape(x.shape) if x.ndim > 1 else torch.Size((x.shape[0] // BLOCK,))
    if shape is None:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has no blocks of {BLOCK}")
    return x.reshape(*shape, BLOCK).amax(-1)


def spread_in_torch(blocks: Tensor, like: Tensor) -> Tensor:
    """:func:`spread`, by operations of torch."""
    return blocks.unsqueeze(-1).expand(*blocks.shape, BLOCK).reshape(like.shape)


_library.impl("block_amax", amax_in_torch, "CompositeExplicitAutograd")
_library.impl("spread", spread_in_torch, "CompositeExplicitAutograd")

AMAX, SPREAD = torch.ops.hbcore.block_amax.default, torch.ops.hbcore.spread.default
"""The two operations as nodes of a graph have them."""
