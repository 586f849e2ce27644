"""Step counters, stored together so that counting a step is one addition for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Address(NamedTuple):
    """Location of a parameter's counter: the index of a tensor in ``tables``, and of an entry in it."""

    table: int
    row: int


class StepCounters:
    """``state[p]["step"]`` is a 0-d float32 view of one counter, as in torch; reading, saving and loading it just work.

    Counters live in ``tables``, tensors of shape ``[2, rows]``: the counters, and a copy that only the engine advances, so that
    outside writes are detected. Parameters added later get a new tensor, so existing views stay valid. The tensors are on the
    host, where the step is needed, or on the parameters' device with ``capturable=True``.
    """

    def __init__(self) -> None:
        self.tables: list[Tensor] = []

    def open(self, values: Sequence[float], device: torch.device | str = "cpu") -> list[Address]:
        """Allocate one counter per entry of ``values``, initialised to it; return their addresses."""
        self.tables.append(torch.tensor([list(values)] * 2, dtype=torch.float32, device=device))
        return [Address(len(self.tables) - 1, row) for row in range(len(values))]

    def view(self, address: Address) -> Tensor:
        """A 0-d view of one counter."""
        return self.tables[address.table][0, address.row]

    def select(self, addresses: Sequence[Address], counts: Sequence[bool] | None = None) -> Selection:
        """The counters read by the next steps, reusable while the same parameters are active.

        Only those with a true entry in ``counts`` (default: all) are advanced.
        """
        return Selection(self.tables, addresses, [True] * len(addresses) if counts is None else counts)


class Selection:
    """A subset of the counters, advanced together.

    Attributes:
        partial: whether some of them are read but not advanced.
    """

    def __init__(self, tables: Sequence[Tensor], addresses: Sequence[Address], counts: Sequence[bool]) -> None:
        self._addresses = list(addresses)
        self.partial = not all(counts)
        rows: dict[int, list[int]] = {}
        for address, counted in zip(addresses, counts, strict=True):
            rows.setdefault(address.table, []).extend([address.row] if counted else [])
        self._tables = {i: tables[i] for i in rows}
        self._rows = {  # indices live on the device: a captured step must not copy them there
            i: None if len(r) == tables[i].shape[1] else torch.tensor(r, dtype=torch.int64, device=tables[i].device)
            for i, r in rows.items()
        }
        self._counters = [t[0] for t in self._tables.values()]
        self._copies = [t[1] for t in self._tables.values()]
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
            counts = {i: t[0].tolist() for i, t in self._tables.items()}
            self._base, self._ahead = [counts[a.table][a.row] for a in self._addresses], 0
        return self._base, self._ahead + 1

    def forget(self) -> None:
        """Re-read the counters before the next step."""
        self._base = None

    def advance(self, by: float | Tensor = 1) -> None:
        """Add ``by`` to each counter: 1, or a 0-d tensor that is 0 for a skipped step."""
        self._ahead += 1
        for i, rows in self._rows.items():
            if rows is None:
                self._tables[i].add_(by)
            else:
                self._tables[i][:, rows] += by
