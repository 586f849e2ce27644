"""Products of float16 parts: which pieces of them are multiplied, worked out once for each pair of shapes.

A step multiplies the same shapes each time, and its host has to keep up with the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hbcore.rules.halves import Halved, make
from hbcore.rules.parts import Layout, Parts, View, views

DEPTH = 768
"""How many products of high parts are summed at once. Tensor cores drop bits from long sums: an H200 is 4e-6 off at 2,304."""

SMALL = 4608
"""The same for products with low parts."""

WIDENS = hasattr(torch.ops.aten.baddbmm, "dtype_out")
"""Whether torch multiplies float16 to a float32 result, as releases since 2.8 do."""

Pieces = tuple[tuple[View, View], ...]


class Plan(NamedTuple):
    """How two stacks are multiplied.

    Attributes:
        left, right: how the parts of each lie in memory.
        pieces: views of both whose products add up to the result.
    """

    left: Layout
    right: Layout
    pieces: Pieces


def product(left: Halved, right: Halved, out: Tensor | None, together: bool) -> tuple[Tensor, Parts, Parts]:
    """``left @ right``, times the scales of both, and the parts of both, which are made if they are not.

    Args:
        left, right: ``[B, m, k]`` and ``[B, k, n]``, not empty.
        out: memory for the result, contiguous, perhaps not used.
        together: see :func:`hbcore.rules.halves.make`.
    """
    if left.made is right.made:  # the same matrices, whose parts lie in one way for each factor
        left = Halved(left.whole, [], left.turned)
    one, other = left.layout, right.layout
    plan = _plan(left.whole.shape, left.turned, one, right.whole.shape, right.turned, other)
    if one is None:
        make([(left, plan.left), (right, plan.right)] if other is None else [(left, plan.left)], together)
    elif other is None:
        make([(right, plan.right)])
    x, y = left.made[0], right.made[0]
    return _summed(x, y, plan.pieces, out), x, y


def _summed(x: Parts, y: Parts, pieces: Pieces, out: Tensor | None) -> Tensor:
    total: Tensor | None = None
    widens = WIDENS and x.memory.is_cuda
    for one, other in pieces:
        a, b = x.view(one), y.view(other)
        if not widens:
            piece = torch.bmm(a.float(), b.float())
            total = piece if total is None else total.add_(piece)
        elif total is None:
            total = torch.bmm(a, b, out_dtype=torch.float32, out=out)
        else:  # in place, without the copy that a result would be
            torch.baddbmm(total, a, b, out_dtype=torch.float32, out=total)
    assert total is not None
    return total


@lru_cache(maxsize=1024)
def _plan(
    left: torch.Size,
    left_turned: bool,
    left_made: Layout | None,
    right: torch.Size,
    right_turned: bool,
    right_made: Layout | None,
) -> Plan:
    """For stacks as they lie in memory, and whether they are transposed.

    Parts that lie side by side along what is summed over, those of one in the other order than those of the other, give both
    products with low parts by one of twice the depth.
    """
    left_run = left[1] * left[2] if left_turned else left[2]
    right_run = right[2] if right_turned else right[1] * right[2]
    x = left_made or Layout(left_run, not right_made.low_first if right_made else True)
    y = right_made or Layout(right_run, not x.low_first)
    (x_high, x_low), (y_high, y_low) = views(left, x, left_turned), views(right, y, right_turned)
    if x.run == left_run and y.run == right_run and x.low_first != y.low_first:
        (count, m, k), n = x_high.size, y_high.size[2]
        small = [(View((count, m, 2 * k), x_high.stride, 0), View((count, 2 * k, n), y_high.stride, 0))]
    else:
        small = [(x_low, y_high), (x_high, y_low)]
    cut = (piece for pair in small for piece in _cut(*pair, SMALL))
    return Plan(x, y, (*cut, *_cut(x_high, y_high, DEPTH)))


def _cut(left: View, right: View, most: int) -> Iterator[tuple[View, View]]:
    """Pieces of two factors, at most so deep."""
    (count, m, k), n = left.size, right.size[2]
    for first in range(0, k, most):
        depth = min(most, k - first)
        yield (
            View((count, m, depth), left.stride, left.offset + first * left.stride[2]),
            View((count, depth, n), right.stride, right.offset + first * right.stride[1]),
        )
