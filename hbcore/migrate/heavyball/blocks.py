"""The blocks that HeavyBall and hbcore cut a parameter into: the same ones, in another order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hbcore.rules.transform import Domain
from hbcore.rules.views import merged


def theirs(shape: Sequence[int], limit: int) -> list[Tensor]:
    """For each of HeavyBall's views of a parameter, the places of its elements in the parameter, in the view's order.

    Args:
        shape: the parameter's.
        limit: the longest side that dimensions are merged to, and that they are cut into; at least 1.
    """
    whole = merged(tuple(shape), limit) if shape else ()
    places = torch.arange(math.prod(shape)).view(whole)
    cuts = [range(0, n, limit) for n in whole]
    corners = (tuple(reversed(corner)) for corner in product(*reversed(cuts)))  # the last dimension is cut first
    return [places[tuple(slice(c, c + limit) for c in corner)].reshape(-1) for corner in corners]


def ours(core: Any, group: Any, param: Tensor) -> list[Tensor]:
    """For each run of blocks of the matrix rule that takes a parameter, the places of its elements; empty if there is none."""
    for rule in core.chain.chain(group, param):
        if rule.domain == Domain.MATRIX and not rule.flat:
            places = torch.arange(param.numel()).view(param.shape)
            return [run.of(places.contiguous()).reshape(-1) for run in rule.blocks(param.shape)]
    return []


def matched(views: Sequence[Tensor], runs: Sequence[Tensor]) -> list[int] | None:
    """For each run, the view of the same elements; None if they are cut otherwise."""
    where = {(int(v[0]), len(v)): i for i, v in enumerate(views)}
    found = [where.get((int(run[0]), len(run))) for run in runs]
    return None if None in found or len(views) != len(runs) else [i for i in found if i is not None]
