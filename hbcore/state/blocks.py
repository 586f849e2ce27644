"""Blocks: 32 neighbouring elements of a row, which a codec may store with one number for all of them, such as a scale.

A blockwise codec (:class:`hbcore.state.codec.BlockCodec`) sees more than one element only through :func:`block_amax` and
:func:`spread`. These and :func:`root_code` are operations of their own in a traced graph, so that each backend has its own
form of them: shuffles in a Triton kernel, an inner loop in C++, a view and a reduction in torch. Their results are exact and
therefore the same on every backend.

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
_library.define("root_code(Tensor x, int largest) -> Tensor")


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


def root_code(x: Tensor, largest: int) -> Tensor:
    """The whole numbers ``n`` with ``n (n - 1) < x <= n (n + 1)``, which are nearest to the square roots of numbers; from 0 on,
    and 0 for 0 alone.

    The same on every machine, which square roots are not: torch's on a CPU is off by a bit for a fifth of its arguments. Half
    above the root there are one or two candidates, and ``n (n - 1)``, which float32 holds exactly, tells.

    Args:
        x: float32, at least 0, any shape; what is above ``largest^2``, and NaN, counts as ``largest^2``.
        largest: up to 1024.

    Returns:
        int32, of ``x``'s shape.
    """
    result: Tensor = torch.ops.hbcore.root_code(x, largest)
    return result


ABOVE_HALF = 0.5 + 2.0**-24
"""The float32 after 1/2: a root of 0 is rounded up like the others, and taken back."""


def root_in_torch(x: Tensor, largest: int) -> Tensor:
    """:func:`root_code`, by operations of torch."""
    x = torch.where(x <= largest**2, x, float(largest**2))
    above = torch.round(torch.sqrt(x) + ABOVE_HALF)
    return above.to(torch.int32) - (x <= above * (above - 1.0)).to(torch.int32)


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
_library.impl("root_code", root_in_torch, "CompositeExplicitAutograd")

AMAX, SPREAD = torch.ops.hbcore.block_amax.default, torch.ops.hbcore.spread.default
ROOT = torch.ops.hbcore.root_code.default
"""The operations as nodes of a graph have them."""

IN_TORCH: dict[Any, Any] = {AMAX: amax_in_torch, SPREAD: spread_in_torch, ROOT: root_in_torch}
"""The same as functions that compilers look into."""
