"""Step counters, stored together so that counting a step is one addition for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Address(NamedTuple):
    """Location of a parameter's counter: a table of counters, and a row in it.

    A table is a tensor of shape ``[2, rows]``: the counters, and a copy that only the engine advances, so that outside writes
    are detected. It lives as long as one of its counters is in use.
    """

    table: Tensor
    row: int

    def view(self) -> Tensor:
        """A 0-d float32 view of the counter, as torch has ``state[p]["step"]``; reading, saving and loading it just work."""
        return self.table[0, self.row]


def open_counters(values: Sequence[float], device: torch.device | str = "cpu") -> list[Address]:
    """Allocate one counter per entry of ``values``, initialised to it, in a table of their own; return their addresses.

    The counters are on the host, where the step is needed, or on the parameters' device with ``capturable=True``.
    """
    table = torch.tensor([list(values)] * 2, dtype=torch.float32, device=device)
    return [Address(table, row) for row in range(len(values))]


class Selection:
    """The counters that the next steps read, reusable while the same parameters are active.

    Args:
        addresses: the counters.
        counts: which of them are advanced; the others are only read.

    Attributes:
        partial: whether some of them are read but not advanced.
    """

    def __init__(self, addresses: Sequence[Address], counts: Sequence[bool]) -> None:
        self.partial = not all(counts)
        self._tables = list({id(a.table): a.table for a in addresses}.values())
        index = {id(table): i for i, table in enumerate(self._tables)}
        self._places = [(index[id(a.table)], a.row) for a in addresses]
        advanced: list[list[int]] = [[] for _ in self._tables]
        for (i, row), counted in zip(self._places, counts, strict=True):
            advanced[i] += [row] if counted else []
        self._rows = [  # indices live on the device: a captured step must not copy them there
            None if len(rows) == table.shape[1] else torch.tensor(rows, dtype=torch.int64, device=table.device)
            for table, rows in zip(self._tables, advanced, strict=True)
        ]
        self._counters = [table[0] for table in self._tables]
        self._copies = [table[1] for table in self._tables]
        self._base: list[float] | None = None
        self._ahead = 0

    def coming(self, trusted: bool) -> tuple[list[float], int]:
        """Step counts after the coming step, as ``(counts, offset)``; each count is ``counts[i] + offset``.

        The list stays the same object as long as only :meth:`advance` writes to the counters.

        Args:
            trusted: skip the check for outside writes, which synchronizes if the counters are on a device.
        """
        if self._base is None or not (trusted or all(map(torch.equal, self._counters, self._copies))):
            for counters, copy in zip(self._counters, self._copies, strict=True):
                copy.copy_(counters)
            counts = [counters.tolist() for counters in self._counters]
            self._base, self._ahead = [counts[i][row] for i, row in self._places], 0
        return self._base, self._ahead + 1

    def forget(self) -> None:
        """Re-read the counters before the next step."""
        self._base = None

    def retract(self) -> None:
        """Take the last :meth:`advance` back."""
        self.advance(-1)
        self._ahead -= 2

    def advance(self, by: float | Tensor = 1) -> None:
        """Add ``by`` to each counter: 1, or a 0-d tensor that is 0 for a skipped step."""
        self._ahead += 1
        for table, rows in zip(self._tables, self._rows, strict=True):
            if rows is None:
                table.add_(by)
            else:
                table[:, rows] += by
