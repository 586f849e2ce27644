"""One level of matrix rules: which rows of which stack run together, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hbcore.distributed.exchange import from_owners, to_owners
from hbcore.engine.graph.program import NONFINITE
from hbcore.engine.group_scalars import Due, GroupScalars
from hbcore.engine.offload import Needs
from hbcore.engine.stacks.flat_stack import FlatStack, FlatView, View
from hbcore.engine.stacks.pairs import Curved
from hbcore.engine.stacks.rule_call import RuleCall
from hbcore.engine.stacks.stack import Part, ShardedView, Stack, StackView
from hbcore.engine.stacks.tools import Tools
from hbcore.rules.transform import Transform

Readings = dict[tuple[int, tuple[str, ...]], list[float]]
"""A group, and the names of its numbers as :attr:`SegmentSpec.numbered` has them -> this step's numbers, read once."""

SAT_OUT = "some matrices of a stack sat a step out: the others were gathered and scattered back"
PARTED = (
    "groups whose matrices share a stack had other numbers for its rule, or refreshed it in other steps: their matrices were "
    "gathered and scattered back; groups that have such numbers when they first step get stacks of their own"
)
"""Why rows of a stack did not run together."""


class StackMember(Protocol):
    """What a level knows of a parameter.

    Attributes:
        param: the parameter itself.
        group: its group's index.
        views: where each matrix rule of its chain sees it.
        stored: its state tensors by name, this rank's parts.
        primed: whether its rules that prime did so.
    """

    param: Tensor
    group: int
    primed: bool
    stored: dict[str, Tensor]

    @property
    def views(self) -> Sequence[View]: ...

    @property
    def reach(self) -> int:
        """How many of its segments take part in a step."""

    def rule_at(self, level: int) -> Transform:
        """The matrix rule with ``level`` others before it."""


class Together(NamedTuple):
    """What rows must share to be handed to a rule in one call. Rows of several groups may: the learning rate and the like are
    used by the segments around the rule, which have a row of numbers for each group.

    Attributes:
        kind: the index, in :attr:`Level.readers`, of the first group with the same numbers for the same rule.
    """

    kind: int
    device: torch.device
    step: float
    priming: bool


class Reader(NamedTuple):
    """One group whose numbers a rule reads. ``spec`` is the spec's ``id``: comparing specs is slow, and the stacks keep them
    alive. ``stack`` is any of the group's that this rule takes."""

    group: int
    spec: int
    stack: Stack


class Call(NamedTuple):
    """A call, and the groups whose rows it has."""

    together: Together
    rule: RuleCall
    groups: list[int]


class Level:
    """The matrix rules that have as many others before them: their stacks' rows, sorted into calls.

    Args:
        members: all active parameters.
        level: how many matrix rules come before this one.
        tools: what all calls share.

    Attributes:
        stacks: each stack's rows: the member, its index among all active ones, and its rows.
        readers: the groups whose numbers the rules read.
        notes: why rows of some stacks do not run together.
        curved: the parameters whose rules need Hessian-vector products.
    """

    def __init__(self, members: Sequence[StackMember], level: int, tools: Tools) -> None:
        self.level, self._traffic, self._tools = level, Traffic(members, level), tools
        self.stacks: dict[Stack, list[tuple[StackMember, int, range]]] = {}
        self._held: list[tuple[Stack, range, list[Tensor]]] = []
        for position, m in enumerate(members):
            if level < min(m.reach, len(m.views)):
                runs = m.views[level].runs
                for k, (block, stack, row) in enumerate(runs):
                    rows = range(row, row + block.batch)
                    self.stacks.setdefault(stack, []).append((m, position, rows))
                    if stack.derived:
                        held = [m.stored[name] for name in stack.keys(k, len(runs)).values()]
                        self._held.append((stack, rows, [t for t in held if not t.is_inference()]))
        self._writes: list[int] = []
        found = {_reader(m, stack): stack for stack, rows in self.stacks.items() for m, _, _ in rows}
        self.readers = [Reader(group, spec, stack) for (group, spec, _), stack in found.items()]
        self._idle = [
            view
            for stack, rows in self.stacks.items()
            if isinstance(stack, FlatStack)
            for view in stack.idle(row for _, _, some in rows for row in some)
        ]
        self.notes: list[str] = []
        self._kinds: list[int] = []
        self._base: list[float] | None = None
        self._calls: list[Call] = []
        self._coming: Mapping[int, GroupScalars] = {}
        self.curved = Curved(members, level)

    def open(self) -> bool:
        """Take memory for the stacks' inputs; return whether some of it lies elsewhere than in the last step."""
        moved = False
        for stack, rows in self.stacks.items():
            if not stack.stored:
                m = rows[0][0]
                whole_view(m.views[self.level]).recall(m.stored)
            moved = stack.open() or moved
        writes = [t._version for _, _, held in self._held for t in held]
        if writes != self._writes:  # somebody wrote to state that they were handed earlier
            self._writes = writes
            for stack, its_rows, held in self._held:
                stack.look(its_rows, held)
        return moved

    def needs(self) -> Needs:
        """The state that :meth:`run` uses: all of it, since a rule may bring matrices of several stacks together."""
        twins = [t for stack in self.stacks for t in stack.twins.values()]
        return Needs(twins, twins, lambda: None)

    def close(self) -> None:
        """Give the memory back."""
        for stack in self.stacks:
            stack.close()
        self.curved.drop()

    def fill(
        self,
        base: list[float],
        ahead: int,
        read: Readings,
        due: Mapping[int, Mapping[str, Due]],
        coming: Mapping[int, GroupScalars],
    ) -> None:
        """Hand each call this step's numbers.

        Args:
            base: the step counts of all active parameters, the same list while they advance together.
            ahead: what to add to them.
            read: the groups' numbers, which the segments before the rules have read.
            due: whether each rule of a group, by name, refreshes.
            coming: what each group will carry to the next step; :meth:`run` adds to it.
        """
        kinds: dict[tuple[float, ...], int] = {}
        given: list[list[float]] = []
        found: list[int] = []
        for i, (g, spec, stack) in enumerate(self.readers):
            values = read[g, stack.key.spec.numbered]
            own = [values[k] for k in stack.reads]
            when = due[g][stack.rule]
            refresh = when if stack.staggers else (when.whole, bool(self.curved) and stack.asks(when))
            found.append(kinds.setdefault((spec, stack.key.index, *refresh, *own), i))
            given.append(values)
        if self._base is not base or self._kinds != found:
            self._base, self._kinds = base, found
            self._arrange(base)
        self._coming = coming
        for (kind, _, step, _), call, some in self._calls:
            call.turn.fill(given[kind], step + ahead, due[some[0]][call.turn.rule.name])

    def run(self, model: Mapping[str, Tensor]) -> int:
        """Bring the rules' inputs to the stacks, run the rules, and bring the results back.

        Args:
            model: the reductions over the model.
        """
        self._traffic.scatter()
        if self.curved:
            self.curved.bring()
        if self._idle:
            torch._foreach_zero_(self._idle)
        for _, call, groups in self._calls:
            carried = call.run(model.get(NONFINITE))
            for g in groups:
                self._coming[g].update(carried)
        self._traffic.gather()
        return 0

    def _arrange(self, base: list[float]) -> None:
        """Sort the rows into calls: those of one rule that have the same numbers and take the same step run together."""
        kind_of = {(g, spec, stack.key.index): k for (g, spec, stack), k in zip(self.readers, self._kinds, strict=True)}
        parts: dict[Together, list[Part]] = {}
        groups: dict[Together, dict[int, None]] = {}
        notes: dict[str, None] = {}
        for stack, members in self.stacks.items():
            found: dict[Together, list[int]] = {}
            latest = max(base[position] for _, position, _ in members) if isinstance(stack, FlatStack) else None
            for m, position, rows in members:
                priming = not m.primed and m.reach == self.level + 1
                step = base[position] if latest is None else latest
                together = Together(kind_of[_reader(m, stack)], stack.key.device, step, priming)
                found.setdefault(together, []).extend(rows)
                groups.setdefault(together, {})[m.group] = None
            if latest is not None:  # those without a gradient are zeros
                found = {together: [*range(len(stack.names))] for together in found}
            for together, chosen in found.items():
                chosen.sort()
                whole = chosen == list(range(len(stack.names)))
                if not whole:
                    notes[PARTED if len({t.kind for t in found}) > 1 else SAT_OUT] = None
                index = None if whole else torch.tensor(chosen, device=stack.key.device)
                parts.setdefault(together, []).append(Part(stack, index, chosen))
        self.notes = list(notes)
        self._calls = [Call(t, RuleCall(some, t.priming, self._tools), list(groups[t])) for t, some in parts.items()]


def _reader(m: StackMember, stack: Stack) -> tuple[int, int, int]:
    """Whose numbers are read for a member's rows of a stack, and by which rule."""
    return m.group, id(stack.key.spec), stack.key.index


def levels_of(members: Sequence[StackMember], tools: Tools) -> list[Level]:
    """The levels of matrix rules that a step has, on any rank."""
    return [Level(members, level, tools) for level in range(max((min(m.reach, len(m.views)) for m in members), default=0))]


def whole_view(view: View) -> StackView | FlatView:
    """Where the rule sees the whole parameter, or this rank's part of it with the others'."""
    return view.inner if isinstance(view, ShardedView) else view


class Traffic:
    """The copies to the stacks of one level and back, where the segments do not write there themselves."""

    def __init__(self, members: Sequence[StackMember], level: int) -> None:
        views = [m.views[level] for m in members if level < min(m.reach, len(m.views))]
        whole = list(map(whole_view, views))
        self._scattered = [view for view in whole if isinstance(view, StackView) and len(view.runs) > 1]
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
