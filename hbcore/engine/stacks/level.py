"""One step of the matrix rules: which rows of which slab run together, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hbcore.distributed.exchange import from_owners, to_owners
from hbcore.engine.graph.segment_spec import Recipe
from hbcore.engine.group_scalars import GroupScalars, carried
from hbcore.engine.planning.segments import Entry, noise_key
from hbcore.engine.stacks.rule_call import Part, Turn
from hbcore.engine.stacks.stack import Seat, Slab, SpreadSeat


class Together(NamedTuple):
    """What rows must share to be handed to a rule together. A recipe's own identity stands for it: it is long to compare."""

    group: int
    recipe: int
    place: int
    device: torch.device
    step: float
    priming: bool


class Level:
    """One level of matrix rules: the rows of its slabs, in the groups that run together, and what goes there and back.

    Attributes:
        partial: whether some of a slab's rows sit this step out, or take it at another step than the rest.
    """

    def __init__(self, entries: list[Entry], level: int) -> None:
        self.level, self.traffic = level, Traffic(entries, level)
        self.members: dict[Slab, list[tuple[Entry, int, range]]] = {}  # with the parameter's place among the active ones
        for place, e in enumerate(entries):
            if level < min(e.reach, len(e.seats)):
                for block, slab, row in e.seats[level].places:
                    self.members.setdefault(slab, []).append((e, place, range(row, row + block.batch)))
        self.partial = False
        self._base: list[float] | None = None
        self._runs: dict[Together, list[Part]] = {}

    def open(self) -> bool:
        """Take memory for the slabs' inputs; say whether some of it lies elsewhere than in the last step."""
        return any([slab.open() for slab in self.members])

    def close(self) -> None:
        """Give the memory back."""
        for slab in self.members:
            slab.close()

    def arrange(self, base: list[float]) -> None:
        """Sort the rows by step; ``base`` is the same list while all parameters advance together."""
        if self._base is base:
            return
        self._base, self._runs, self.partial = base, {}, False
        for slab, members in self.members.items():
            found: dict[tuple[float, bool], list[int]] = {}
            for e, place, rows in members:
                found.setdefault((base[place], not e.primed and e.reach == self.level + 1), []).extend(rows)
            key = slab.key
            for (step, priming), chosen in found.items():
                chosen.sort()
                whole = chosen == list(range(len(slab.names)))
                self.partial = self.partial or not whole
                index = None if whole else torch.tensor(chosen, device=key.device)
                together = Together(key.group, id(key.recipe), key.place, key.device, step, priming)
                self._runs.setdefault(together, []).append(Part(slab, index, [slab.names[r] for r in chosen]))

    def run(
        self,
        ahead: int,
        scalars: Callable[[int, Recipe], dict[str, Tensor]],
        refreshes: Mapping[int, Mapping[str, bool]],
        before: Sequence[GroupScalars],
        after: Mapping[int, GroupScalars],
    ) -> None:
        """Bring the rules' inputs to the slabs, run the rules, and bring the results back.

        Args:
            ahead: what to add to the counts that the rows were sorted by.
            scalars: what a group's recipe asks for, 0-d float64 each; the step is each row's own.
            refreshes: whether each rule of a group, by name, refreshes.
            before, after: what each group carried from the last step, and will carry to the next.
        """
        self.traffic.deal()
        for together, parts in self._runs.items():
            g, recipe = together.group, parts[0].slab.key.recipe
            step = torch.tensor(together.step + ahead, dtype=torch.float64)
            rule = recipe.whole_chain({**scalars(g, recipe), "step": step})[together.place]
            held = {n: torch.tensor(v, dtype=torch.float64) for n, v in carried(before[g], [rule]).items()}
            turn = Turn(rule, step, refreshes[g][rule.name], together.priming, recipe.divide, held, noise_key)
            for new in turn.run(parts):
                after[g].update({n: float(v) for n, v in new.items()})
        self.traffic.collect()


def levels_of(entries: list[Entry], before: list[Level]) -> list[Level]:
    """The levels of matrix rules that a step has, on whatever rank, open; those of the steps ``before`` are closed."""
    for level in before:
        level.close()
    levels = [Level(entries, level) for level in range(max((min(e.reach, len(e.seats)) for e in entries), default=0))]
    for level in levels:
        level.open()
    return levels


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
