"""One level of matrix rules: which rows of which stack run together, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hbcore.distributed.exchange import from_owners, to_owners
from hbcore.engine.graph.program import NONFINITE
from hbcore.engine.graph.scalar_inputs import numbers
from hbcore.engine.group_scalars import GroupScalars
from hbcore.engine.stacks.rule_call import Part, RuleCall
from hbcore.engine.stacks.stack import ShardedView, Stack, StackView


class StackMember(Protocol):
    """What a level knows of a parameter.

    Attributes:
        views: where each matrix rule of its chain sees it.
        stored: its state tensors by name, this rank's parts.
        primed: whether its rules that prime did so.
    """

    primed: bool
    stored: dict[str, Tensor]

    @property
    def views(self) -> Sequence[StackView | ShardedView]: ...

    @property
    def reach(self) -> int:
        """How many of its segments take part in a step."""


class Together(NamedTuple):
    """What rows must share to be handed to a rule in one call. ``spec`` is the spec's ``id``: comparing specs is slow, and the
    stacks keep them alive."""

    group: int
    spec: int
    rule: int
    device: torch.device
    step: float
    priming: bool


class Level:
    """The matrix rules that have as many others before them: their stacks' rows, sorted into calls.

    Args:
        members: all active parameters.
        level: how many matrix rules come before this one.

    Attributes:
        stacks: each stack's rows: the member, its index among all active ones, and its rows.
        partial: whether some of a stack's rows sit this step out, or take it at another step than the rest.
    """

    def __init__(self, members: Sequence[StackMember], level: int) -> None:
        self.level, self._traffic = level, Traffic(members, level)
        self.stacks: dict[Stack, list[tuple[StackMember, int, range]]] = {}
        for position, m in enumerate(members):
            if level < min(m.reach, len(m.views)):
                for block, stack, row in m.views[level].runs:
                    self.stacks.setdefault(stack, []).append((m, position, range(row, row + block.batch)))
        self.partial = False
        self._base: list[float] | None = None
        self._calls: list[tuple[Together, RuleCall]] = []
        self._coming: Mapping[int, GroupScalars] = {}

    def open(self) -> bool:
        """Take memory for the stacks' inputs; return whether some of it lies elsewhere than in the last step."""
        moved = False
        for stack, rows in self.stacks.items():
            if not stack.stored:
                m = rows[0][0]
                whole_view(m.views[self.level]).recall(m.stored)
            moved = stack.open() or moved
        return moved

    def close(self) -> None:
        """Give the memory back."""
        for stack in self.stacks:
            stack.close()

    def fill(
        self,
        base: list[float],
        ahead: int,
        groups: Sequence[Mapping[str, Any]],
        carries: Mapping[int, Mapping[str, float]],
        refreshes: Mapping[int, Mapping[str, bool]],
        coming: Mapping[int, GroupScalars],
    ) -> None:
        """Hand each call this step's numbers.

        Args:
            base: the step counts of all active parameters, the same list while they advance together.
            ahead: what to add to them.
            groups: the param groups.
            carries: the rules' scalars that each active group carries from the last step.
            refreshes: whether each rule of a group, by name, refreshes.
            coming: what each group will carry to the next step; :meth:`run` adds to it.
        """
        if self._base is not base:
            self._arrange(base)
        self._coming = coming
        for together, call in self._calls:
            g = together.group
            call.fill(numbers(call.spec, groups[g], carries[g]), together.step + ahead, refreshes[g][call.rule.name])

    def run(self, model: Mapping[str, Tensor]) -> int:
        """Bring the rules' inputs to the stacks, run the rules, and bring the results back.

        Args:
            model: the reductions over the model.
        """
        self._traffic.scatter()
        for together, call in self._calls:
            for name, value in call.run(model.get(NONFINITE)).items():
                self._coming[together.group][name] = value
        self._traffic.gather()
        return 0

    def _arrange(self, base: list[float]) -> None:
        """Sort the rows into calls: those of one rule that take the same step run together."""
        parts: dict[Together, list[Part]] = {}
        self._base, self.partial = base, False
        for stack, members in self.stacks.items():
            found: dict[tuple[float, bool], list[int]] = {}
            for m, position, rows in members:
                found.setdefault((base[position], not m.primed and m.reach == self.level + 1), []).extend(rows)
            key = stack.key
            for (step, priming), chosen in found.items():
                chosen.sort()
                whole = chosen == list(range(len(stack.names)))
                self.partial = self.partial or not whole
                index = None if whole else torch.tensor(chosen, device=key.device)
                together = Together(key.group, id(key.spec), key.index, key.device, step, priming)
                parts.setdefault(together, []).append(Part(stack, index, [stack.names[r] for r in chosen]))
        self._calls = [(together, RuleCall(some, together.priming)) for together, some in parts.items()]


def levels_of(members: Sequence[StackMember]) -> list[Level]:
    """The levels of matrix rules that a step has, on any rank."""
    return [Level(members, level) for level in range(max((min(m.reach, len(m.views)) for m in members), default=0))]


def whole_view(view: StackView | ShardedView) -> StackView:
    """Where the rule sees the whole parameter."""
    return view if isinstance(view, StackView) else view.inner


class Traffic:
    """The copies to the stacks of one level and back, where the segments do not write there themselves."""

    def __init__(self, members: Sequence[StackMember], level: int) -> None:
        views = [m.views[level] for m in members if level < min(m.reach, len(m.views))]
        whole = list(map(whole_view, views))
        self._scattered = [view for view in whole if len(view.runs) > 1]
        self._sharded: dict[tuple[object, tuple[tuple[str, torch.dtype], ...]], list[ShardedView]] = {}
        for view in views:
            if isinstance(view, ShardedView):
                self._sharded.setdefault((view.shards.mesh, tuple(view.feeds.items())), []).append(view)

    def scatter(self) -> None:
        """Bring the rules' inputs to the stacks."""
        for (_, feeds), views in self._sharded.items():
            for name, _ in feeds:
                to_owners([view.transfer(name) for view in views], views[0].shards)
        for view in self._scattered:
            view.scatter()

    def gather(self) -> None:
        """Bring the results to where the next segments read them."""
        for view in self._scattered:
            view.gather()
        for views in self._sharded.values():
            from_owners([view.transfer("update") for view in views], views[0].shards)
