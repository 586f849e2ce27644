"""One step of the matrix rules: which rows of which slab run together, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hbcore.distributed.exchange import from_owners, to_owners
from hbcore.engine.lanes import Entry, noise_key
from hbcore.engine.progress import Progress, carried
from hbcore.engine.slabs import Seat, Slab, SpreadSeat, Turn


@dataclass(frozen=True)
class Member:
    """An active parameter's rows in a slab."""

    entry: Entry
    place: int
    rows: range


class Stack:
    """The active rows of one slab.

    Attributes:
        level: how many matrix rules come before this one.
        members: the parameters that the rows belong to.
    """

    def __init__(self, slab: Slab, level: int, members: list[Member]) -> None:
        self.slab, self.level, self.members = slab, level, members
        self._base: list[float] | None = None
        self._parts: list[tuple[float, bool, Tensor | None, list[str]]] = []

    @property
    def partial(self) -> bool:
        """Whether some of the slab's rows sit this step out, or take it at another step than the rest."""
        return len(self._parts) > 1 or any(rows is not None for _, _, rows, _ in self._parts)

    def arrange(self, base: list[float]) -> None:
        """Sort the rows by step; ``base`` is the same list while all parameters advance together."""
        if self._base is base:
            return
        groups: dict[tuple[float, bool], list[int]] = {}
        for m in self.members:
            priming = not m.entry.primed and m.entry.reach == self.level + 1
            groups.setdefault((base[m.place], priming), []).extend(m.rows)
        self._base, self._parts = base, []
        for (count, priming), rows in groups.items():
            whole = sorted(rows) == list(range(len(self.slab.names)))
            index = None if whole else torch.tensor(sorted(rows), device=self.slab.key.device)
            self._parts.append((count, priming, index, [self.slab.names[r] for r in sorted(rows)]))

    def turns(self, scalars: Mapping[str, Tensor], ahead: int, refreshes: Mapping[str, bool], progress: Progress) -> list[Turn]:
        """The runs of the rule that this step takes.

        Args:
            scalars: what the group's recipe asks for, 0-d float64 each; the step is each row's own.
            ahead: what to add to the counts that the rows were sorted by.
            refreshes: whether each rule, by name, refreshes.
            progress: what the group carries from the last step.
        """
        recipe, turns = self.slab.key.recipe, list[Turn]()
        for count, priming, rows, names in self._parts:
            step = torch.tensor(count + ahead, dtype=torch.float64)
            rule = recipe.whole_chain({**scalars, "step": step})[self.slab.key.place]
            state = {n: torch.tensor(v, dtype=torch.float64) for n, v in carried(progress, [rule]).items()}
            turns.append(Turn(rule, rows, names, step, refreshes[rule.name], priming, recipe.divide, state, noise_key))
        return turns


def stacks_of(entries: list[Entry]) -> list[Stack]:
    """One :class:`Stack` for each slab that an active parameter has rows in, in order of appearance."""
    slabs: dict[Slab, tuple[int, list[Member]]] = {}
    for place, e in enumerate(entries):
        for level, seat in enumerate(e.seats[: min(e.reach, len(e.seats))]):
            for block, slab, row in seat.places:
                slabs.setdefault(slab, (level, []))[1].append(Member(e, place, range(row, row + block.batch)))
    return [Stack(slab, level, members) for slab, (level, members) in slabs.items()]


def levels_of(entries: list[Entry]) -> int:
    """How many levels of matrix rules a step has, on whatever rank."""
    return max((min(e.reach, len(e.seats)) for e in entries), default=0)


class Traffic:
    """What goes to the slabs of one level, and back, other than by a lane's own writing."""

    def __init__(self, entries: list[Entry], level: int) -> None:
        seats = [e.seats[level] for e in entries if level < min(e.reach, len(e.seats))]
        whole = [seat if isinstance(seat, Seat) else seat.inner for seat in seats]
        self._scattered = [seat for seat in whole if len(seat.places) > 1]
        self._spread: dict[tuple[object, tuple[tuple[str, torch.dtype], ...]], list[SpreadSeat]] = {}
        for seat in seats:
            if isinstance(seat, SpreadSeat):
                self._spread.setdefault((seat.shards.mesh, tuple(seat.feeds.items())), []).append(seat)

    def deal(self) -> None:
        """Bring the rules' inputs to the slabs."""
        for (_, feeds), seats in self._spread.items():
            for name, _ in feeds:
                to_owners([seat.parcel(name) for seat in seats], seats[0].shards)
        for seat in self._scattered:
            seat.deal()

    def collect(self) -> None:
        """Bring the results to where the next lanes read them."""
        for seat in self._scattered:
            seat.collect()
        for seats in self._spread.values():
            from_owners([seat.parcel("update") for seat in seats], seats[0].shards)
