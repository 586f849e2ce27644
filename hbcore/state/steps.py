"""Step counters: one row of a slab for each parameter, so that counting a step is one addition for the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class StepCounters:
    """``state[p]["step"]`` is a 0-d float32 view of a row, as torch has it; reading, saving and loading it just work.

    A parameter that arrives late opens a new slab, so the views handed out before stay valid.
    """

    def __init__(self) -> None:
        self._slabs: list[Tensor] = []

    def open(self, values: Sequence[float]) -> list[tuple[int, int]]:
        """Open one row for each of ``values``, holding it; return their ``(slab, row)`` addresses."""
        self._slabs.append(torch.tensor(list(values), dtype=torch.float32))
        return [(len(self._slabs) - 1, row) for row in range(len(values))]

    def view(self, address: tuple[int, int]) -> Tensor:
        """The 0-d view of one row."""
        return self._slabs[address[0]][address[1]]

    def advance(self, addresses: Iterable[tuple[int, int]]) -> list[float]:
        """Add one to each row, and return the new counts in the order of ``addresses``."""
        addresses = list(addresses)
        active: dict[int, list[int]] = {}
        for slab, row in addresses:
            active.setdefault(slab, []).append(row)
        counts: dict[int, list[float]] = {}
        for index, rows in active.items():
            counters = self._slabs[index]
            if len(rows) == counters.numel():
                counters.add_(1)
            else:
                counters[rows] += 1
            counts[index] = counters.tolist()
        return [counts[slab][row] for slab, row in addresses]
