"""One call of a matrix rule on rows of stacks: what it is given, and where its results go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.engine.graph.purity import Purity
from hbcore.engine.precision import exact_products
from hbcore.engine.stacks.absent import Absent
from hbcore.engine.stacks.bound_rule import BoundRule
from hbcore.engine.stacks.stack import Stack
from hbcore.engine.stacks.stack_state import Rows, StackState, WatchedState
from hbcore.errors import RuleError
from hbcore.rules.author_errors import naming
from hbcore.rules.contract import check_state, checked, title, unknown_slot
from hbcore.rules.declared import kind
from hbcore.rules.noise import bits, noise_key, normal, uniform
from hbcore.rules.transform import Context, State, Transform
from hbcore.state.codec import codec_of

MISSING = object()
"""In place of a result that a rule did not return."""


class Part(NamedTuple):
    """Rows of one stack that take the same step.

    Attributes:
        rows: which of the stack's rows; None for all of them.
        names: what their random numbers are drawn by.
    """

    stack: Stack
    rows: Tensor | None
    names: list[str]


class RuleCall:
    """A rule, and the rows of its stacks that it is handed together.

    Args:
        parts: rows of stacks of one spec and rule, whose groups have the same numbers for it.
        priming: the rule only prepares its state from these updates.

    Attributes:
        rule: the rule, bound to this call's numbers.
        step: the rows' step.
        refresh: whether the rule's expensive part is due.
        carried: what the groups carry for this rule.
    """

    def __init__(self, parts: Sequence[Part], priming: bool) -> None:
        key = parts[0].stack.key
        self.spec, self.priming = key.spec, priming
        self._bound = BoundRule(key.spec, key.index)
        self.rule, self.carried = self._bound.rule, self._bound.carried
        self.step, self.refresh = 0, True
        self._arguments = [Arguments(self, part) for part in parts]
        self._checked = all(part.stack.checked for part in parts)

    @property
    def step_tensor(self) -> Tensor:
        """The rows' step, 0-d float64 on the host."""
        return self._bound.scalars["step"]

    def fill(self, numbers: Sequence[float], step: float, refresh: bool) -> None:
        """Take this step's numbers: hyperparameters and what a group carries, as in ``spec.scalar_names``."""
        self.step, self.refresh = int(step), refresh
        self.rule = self._bound.fill(numbers, step)

    def run(self, nonfinite: Tensor | None = None) -> dict[str, float]:
        """Run the rule over its rows, in place; return the new values of what the group carries.

        Where ``nonfinite``, 0-d, is above 0, the rows keep the state that they have.
        """
        carried: dict[str, float] = {}
        arguments = self._arguments
        for each in arguments:
            each.skip = None if nonfinite is None else nonfinite.to(each.stack.key.device) > 0
        with exact_products():
            if self.priming or not self._checked:
                return self._run_checked()
            results = self.rule.update_stacks([each.given() for each in arguments])
            # a result that is computed only when it is asked for is written before the next one takes memory
            for each, (update, new) in zip(arguments, results, strict=True):
                carried.update(each.keep(new, update))
        return carried

    def _run_checked(self) -> dict[str, float]:
        """The same for a rule's first run on its stacks, and for priming: the rule must be pure and return what it may.

        Raises:
            RuleError: it writes to what it was given, or returns something else than an update and its slots.
        """
        carried: dict[str, float] = {}
        purity = Purity()
        given = [each.watched(purity) for each in self._arguments]
        if self.priming:
            for each, arguments in zip(self._arguments, given, strict=True):
                with purity, naming(self.rule, "prime"):
                    new = self.rule.prime(*arguments)
                check_state(self.rule, new, each.shapes(), False, "prime")
                carried.update(each.keep(new))
            return carried
        with purity, naming(self.rule):
            made = self.rule.update_stacks(given)
        if not isinstance(made, Iterable):
            raise RuleError(f"{title(self.rule, 'update_stacks')} returned {kind(made)}; return a result for each stack.")
        results, count = iter(made), 0
        for each, arguments in zip(self._arguments, given, strict=True):
            with purity, naming(self.rule):  # a result may be computed only now
                result = next(results, MISSING)
            if result is MISSING:
                break
            update, new = checked(self.rule, result, arguments[0], each.shapes(), whole=False)
            carried.update(each.keep(new, update))
            purity.take_back()
            count += 1
        if count < len(given) or next(results, MISSING) is not MISSING:
            raise RuleError(
                f"{title(self.rule, 'update_stacks')} returned {'more' if count == len(given) else count} results for "
                f"{len(given)} stacks; return one for each."
            )
        self._checked = True
        for each in self._arguments:
            each.stack.checked = True
        return carried


class Arguments:
    """What a rule is given for one part, and what is kept of its results."""

    def __init__(self, call: RuleCall, part: Part) -> None:
        self._call, self._part = call, part
        stack, rows = part.stack, part.rows
        self.stack = stack
        self._stored: Mapping[str, Tensor] = stack.stored if rows is None else Rows(stack.stored, rows)
        self._state = StackState(self._stored, stack.slots, stack.key, call.carried)
        self._absent: dict[str, Any] = {name: Absent(call.rule, name) for name in ("param", "grad")}
        self._dims = tuple(range(1, len(stack.key.shape) + 1))
        self._numel = torch.tensor(float(torch.Size(stack.key.shape).numel()), dtype=torch.float64, device="cpu")
        self._draws = 0
        self.skip: Tensor | None = None
        self._context = Context(
            **self._absent,
            step=call.step_tensor,
            divide=call.spec.divide,
            sum=self._sum,
            amax=self._amax,
            numel=self._numel,
            probe=self._probe,
            noise=self._noise,
        )

    def given(self) -> tuple[Tensor, State, Context]:
        """The arguments of the rule's ``update`` in this step."""
        stack, rows = self._part.stack, self._part.rows
        inputs = stack.inputs if rows is None else {name: t[rows] for name, t in stack.inputs.items()}
        self._draws = 0
        context = self._context._replace(
            param=inputs.get("param", self._absent["param"]),
            grad=inputs.get("grad", self._absent["grad"]),
            refresh=self._call.refresh,
        )
        return inputs["update"], self._state, context._replace(apply=lambda inner, u, s: inner.update(u, s, context))

    def watched(self, purity: Purity) -> tuple[Tensor, State, Context]:
        """The same for a rule whose writes ``purity`` watches, and what its inner rules return."""
        update, state, context = self.given()
        purity.give(self._call.rule, (update, *self.stack.stored.values(), *context))

        def apply(inner: Transform, u: Tensor, s: State) -> tuple[Tensor, dict[str, Tensor]]:
            with naming(inner):
                return checked(inner, inner.update(u, s, context), u, s, whole=False)

        return update, WatchedState(self._call.rule, state, purity), context._replace(apply=apply)

    def shapes(self) -> dict[str, Tensor]:
        """Tensors of the shapes of the rows' slots, and of what the group carries; without memory."""
        rows = len(self._part.names)
        slots = {n: torch.empty((rows, *slot.shape), device="meta") for n, slot in self._part.stack.slots.items()}
        return {**slots, **self._call.carried}

    def keep(self, new: Mapping[str, Tensor], update: Tensor | None = None) -> dict[str, float]:
        """Write what the rule returned to the stack; return what the group carries."""
        stack, rows, carried = self._part.stack, self._part.rows, dict[str, float]()
        # Results that are views of this stack's memory are copied first: it is overwritten below. Rows are copies already.
        memory = _memory((*stack.inputs.values(), *stack.stored.values())) if rows is None else set()
        kept = [(name, value.clone() if _memory((value,)) <= memory else value) for name, value in new.items()]
        if update is not None:
            update = update.clone() if update is not stack.inputs["update"] and _memory((update,)) <= memory else update
            _put(stack.inputs["update"], rows, update)
        for name, value in kept:
            if name in self._call.carried:
                carried[name] = float(value)
            else:
                self._write(name, value)
        return carried

    def _write(self, name: str, value: Tensor) -> None:
        stack, call = self._part.stack, self._call
        if name not in stack.slots:
            raise RuleError(unknown_slot(call.rule, name, stack.slots, "returned"))
        slot, spec = stack.slots[name], call.spec
        noise = None
        if spec.stochastic and not slot.exact and spec.codec.rounds:
            noise = bits(self._keys(f"round.{name}"), slot.shape.numel(), stack.key.device).view(-1, *slot.shape)
        for part, kept in codec_of(slot, spec.codec).write(self._stored, name, value, noise).items():
            new = kept if self.skip is None else torch.where(self.skip, self._stored[part], kept)
            _put(stack.stored[part], self._part.rows, new)

    def _keys(self, what: str) -> Tensor:
        """A key for each row, int64."""
        keys = [noise_key(name, what, self._call.step) for name in self._part.names]
        return torch.tensor(keys, dtype=torch.int64, device="cpu")

    def _drawn(self, draw: Callable[..., Tensor], like: Tensor) -> Tensor:
        self._draws += 1
        keys = self._keys(f"{self._call.rule.name}.{self._draws}")
        return draw(keys, like[0].numel(), like.device).view(like.shape).to(like.dtype)

    def _probe(self, like: Tensor) -> Tensor:
        return self._drawn(normal, like)

    def _noise(self, like: Tensor) -> Tensor:
        return self._drawn(uniform, like)

    def _sum(self, x: Tensor) -> Tensor:
        return x.sum(self._dims, keepdim=True) if self._dims else x  # no dimensions would mean all of them

    def _amax(self, x: Tensor) -> Tensor:
        return x.amax(self._dims, keepdim=True) if self._dims else x


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def _put(target: Tensor, rows: Tensor | None, value: Tensor) -> None:
    if value is target:
        return
    if rows is None:
        torch._foreach_copy_([target], [value])  # reads and writes whole words where copy_, between dtypes, does not
    else:
        target[rows] = value.to(target.dtype)
