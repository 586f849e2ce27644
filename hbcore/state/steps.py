"""Step counters: one row of a slab for each parameter, so that counting a step is one addition for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Address(NamedTuple):
    """Where a parameter's counter is."""

    slab: int
    row: int


class StepCounters:
    """``state[p]["step"]`` is a 0-d float32 view of a row, as torch has it; reading, saving and loading it just work.

    A parameter that arrives late opens a new slab, so the views handed out before stay valid. Slabs are on the host, where
    the step is needed; with ``capturable=True`` they are on the parameters' device. A slab is ``[2, rows]``: the counters,
    and a copy that only the engine advances, which tells whether somebody else wrote to them.
    """

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []

    def open(self, values: Sequence[float], device: torch.device | str = "cpu") -> list[Address]:
        """Open one row for each of ``values``, holding it; return their addresses."""
        self.slabs.append(torch.tensor([list(values)] * 2, dtype=torch.float32, device=device))
        return [Address(len(self.slabs) - 1, row) for row in range(len(values))]

    def view(self, address: Address) -> Tensor:
        """The 0-d view of one row."""
        return self.slabs[address.slab][0, address.row]

    def select(self, addresses: Sequence[Address], counts: Sequence[bool] | None = None) -> Selection:
        """The rows that the coming steps read, found once and used while the same parameters are active.

        Only those for which ``counts`` holds, all by default, are advanced.
        """
        return Selection(self.slabs, addresses, [True] * len(addresses) if counts is None else counts)


class Selection:
    """Some rows of the counters, advanced together.

    Attributes:
        partial: whether some are only read.
    """

    def __init__(self, slabs: Sequence[Tensor], addresses: Sequence[Address], counts: Sequence[bool]) -> None:
        self._addresses = list(addresses)
        self.partial = not all(counts)
        rows: dict[int, list[int]] = {}
        for address, counted in zip(addresses, counts, strict=True):
            rows.setdefault(address.slab, []).extend([address.row] if counted else [])
        self._slabs = {i: slabs[i] for i in rows}
        self._rows = {  # an index that is on the device already: a captured step may copy none to it
            i: None if len(r) == slabs[i].shape[1] else torch.tensor(r, dtype=torch.int64, device=slabs[i].device)
            for i, r in rows.items()
        }
        self._counters = [slab[0] for slab in self._slabs.values()]
        self._copies = [slab[1] for slab in self._slabs.values()]
        self._base: list[float] | None = None
        self._ahead = 0

    def coming(self, trusted: bool) -> tuple[list[float], int]:
        """The counts that :meth:`advance` will lead to: a list to which the second value is to be added.

        The list stays the same object while nothing but :meth:`advance` writes to the counters.

        Args:
            trusted: do not look whether somebody else wrote to them, which waits for a slab on a device.
        """
        if self._base is None or not (trusted or all(map(torch.equal, self._counters, self._copies))):
            for counters, copy in zip(self._counters, self._copies, strict=True):
                copy.copy_(counters)
            counts = {i: slab[0].tolist() for i, slab in self._slabs.items()}
            self._base, self._ahead = [counts[a.slab][a.row] for a in self._addresses], 0
        return self._base, self._ahead + 1

    def forget(self) -> None:
        """Read the counters anew before the next step."""
        self._base = None

    def advance(self, by: float | Tensor = 1) -> None:
        """Add ``by`` to each row: 1, or a 0-d tensor that is 0 where a step is skipped."""
        self._ahead += 1
        for i, rows in self._rows.items():
            if rows is None:
                self._slabs[i].add_(by)
            else:
                self._slabs[i][:, rows] += by
