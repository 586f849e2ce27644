"""One call of a matrix rule on rows of stacks: what it is given, and where its results go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from hbcore.engine.graph.purity import Purity
from hbcore.engine.precision import products_as
from hbcore.engine.stacks.arguments import Arguments
from hbcore.engine.stacks.flat_arguments import FlatArguments
from hbcore.engine.stacks.stack import Part
from hbcore.engine.stacks.tools import Tools
from hbcore.engine.stacks.turn import Turn
from hbcore.errors import RuleError
from hbcore.rules.author_errors import naming
from hbcore.rules.contract import check_state, checked, title
from hbcore.rules.declared import kind
from hbcore.rules.noise import stream_key
from hbcore.rules.transform import Transform

MISSING = object()
"""In place of a result that a rule did not return."""


class RuleCall:
    """A rule, and the rows of its stacks that it is handed together.

    Args:
        parts: rows of stacks of one spec and rule, whose groups have the same numbers for it.
        priming: the rule only prepares its state from these updates.
        tools: what the optimizer's calls share.

    Attributes:
        turn: the rule, bound to this step's numbers.
    """

    def __init__(self, parts: Sequence[Part], priming: bool, tools: Tools) -> None:
        self.turn, self.priming = Turn(parts[0].stack.key, tools), priming
        self._arguments = [
            FlatArguments(self.turn, part) if self.turn.rule.flat else Arguments(self.turn, part) for part in parts
        ]
        self._refreshes = type(self.turn.rule).refresh is not Transform.refresh
        staggered = parts if self.turn.rule.staggers else ()
        self._phases = [[phase_of(name) for name in part.names] for part in staggered]

    def run(self, nonfinite: Tensor | None = None) -> dict[str, float]:
        """Run the rule over its rows, in place; return the new values of what the group carries.

        Where ``nonfinite``, 0-d, is above 0, the rows keep the state that they have.
        """
        with products_as(self.turn.tools.matmul_precision):
            self._derive()
            for each in self._arguments:
                each.take(nonfinite)
            if self.priming:
                return self._prime()
            carried = self._run() if _known(self._arguments, "update") else self._run_checked()
            if self._refreshes and (due := self._due()):
                self._refresh(due)
        return carried

    def _derive(self) -> None:
        """Compute the derived slots of rows that lack them, watched: this is rare.

        Raises:
            RuleError: the rule's ``derive`` writes to what it was given, or returns something else than its derived slots.
        """
        rule = self.turn.rule
        for each in self._arguments:
            if each.stack.unknown.isdisjoint(each.part.places):
                continue
            purity = Purity()
            arguments = each.underived(purity)
            with purity, naming(rule, "derive"):
                new = rule.derive(*arguments)
            shapes = each.slot_shapes()
            check_state(rule, new, {name: shapes[name] for name in sorted(each.stack.derived)}, True, "derive")
            each.keep_derived(new)

    def _run(self) -> dict[str, float]:
        carried, rule = dict[str, float](), self.turn.rule
        results, count = iter(rule.update_stacks([each.given() for each in self._arguments])), 0
        for each in self._arguments:
            result: Any = next(results, MISSING)
            if result is MISSING:
                break
            carried.update(each.keep(result[1], result[0]))
            del result  # it is written: the next one, which may be computed only now, takes memory
            count += 1
        if count < len(self._arguments) or next(results, MISSING) is not MISSING:
            raise _miscounted(rule, "update_stacks", count, len(self._arguments))
        return carried

    def _due(self) -> Sequence[Arguments]:
        """The rows that refresh in this step: all or none of them, or those whose turn it is."""
        turn = self.turn
        if not turn.rule.staggers:
            return self._arguments if turn.due.whole else ()
        turns = ([i for i, phase in enumerate(phases) if turn.due.at(phase)] for phases in self._phases)
        parts = (each.part.only(rows) for each, rows in zip(self._arguments, turns, strict=True))
        some = [Arguments(turn, part) for part in parts if part is not None]
        for mine in some:
            mine.take(self._arguments[0].nonfinite)
        return some

    def _refresh(self, due: Sequence[Arguments]) -> None:
        """Run the rule's own refresh, watched the first time.

        Raises:
            RuleError: it writes to what it was given, or returns something else than slots for each stack.
        """
        rule = self.turn.rule
        if _known(due, "refresh"):
            results, count = iter(rule.refresh([each.settled() for each in due])), 0
            for each in due:
                new: Any = next(results, MISSING)
                if new is MISSING:
                    break
                each.keep(new)
                del new
                count += 1
            if count < len(due) or next(results, MISSING) is not MISSING:
                raise _miscounted(rule, "refresh", count, len(due))
            return
        purity = Purity()
        given = [each.settled_watched(purity) for each in due]
        with purity, naming(rule, "refresh"):
            made: Any = rule.refresh(given)
        watched, count = _results(rule, "refresh", made), 0
        for each in due:
            with purity, naming(rule, "refresh"):
                returned: Any = next(watched, MISSING)
            if returned is MISSING:
                break
            check_state(rule, returned, each.slot_shapes(), False, "refresh")
            each.keep(returned)
            del returned
            purity.take_back()
            count += 1
        if count < len(given) or next(watched, MISSING) is not MISSING:
            raise _miscounted(rule, "refresh", count, len(given))
        for each in due:
            each.stack.checked.add("refresh")

    def _prime(self) -> dict[str, float]:
        """Prepare the state from the first update, watched."""
        carried, purity, rule = dict[str, float](), Purity(), self.turn.rule
        for each in self._arguments:
            arguments = each.watched(purity)
            with purity, naming(rule, "prime"):
                new = rule.prime(*arguments)
            check_state(rule, new, each.shapes(), False, "prime")
            carried.update(each.keep(new))
            each.stack.outdate(each.part.places)
        return carried

    def _run_checked(self) -> dict[str, float]:
        """The same for a rule's first run on its stacks: the rule must be pure and return what it may.

        Raises:
            RuleError: it writes to what it was given, or returns something else than an update and its slots.
        """
        carried, purity, rule = dict[str, float](), Purity(), self.turn.rule
        given = [each.watched(purity) for each in self._arguments]
        with purity, naming(rule):
            made = rule.update_stacks(given)
        results, count = _results(rule, "update_stacks", made), 0
        for each, arguments in zip(self._arguments, given, strict=True):
            with purity, naming(rule):  # a result may be computed only now
                result = next(results, MISSING)
            if result is MISSING:
                break
            update, new = checked(rule, result, arguments[0], each.shapes(), whole=False)
            carried.update(each.keep(new, update))
            del result, update, new
            purity.take_back()
            count += 1
        if count < len(given) or next(results, MISSING) is not MISSING:
            raise _miscounted(rule, "update_stacks", count, len(given))
        for each in self._arguments:
            each.stack.checked.add("update")
        return carried


def _known(arguments: Sequence[Arguments], method: str) -> bool:
    """Whether a rule's method ran on all of these stacks and was seen to be pure, and to return what it may."""
    return all(method in each.stack.checked for each in arguments)


def _results(rule: Transform, method: str, made: Any) -> Iterator[Any]:
    """What a rule's method returned for its stacks, one after the other."""
    if not isinstance(made, Iterable):
        raise RuleError(f"{title(rule, method)} returned {kind(made)}; return a result for each stack.")
    return iter(made)


def _miscounted(rule: Transform, method: str, count: int, stacks: int) -> RuleError:
    """The error of a method that returned another number of results than there are stacks; ``count`` of them were taken."""
    found = "more" if count == stacks else count
    return RuleError(f"{title(rule, method)} returned {found} results for {stacks} stacks; return one for each.")


def phase_of(name: str) -> float:
    """The place of a row in the interval between two refreshes, in [0, 1); by its name, so that it is the same everywhere."""
    return (stream_key(name, "stagger") & 0xFFFFFFFF) / 2**32
