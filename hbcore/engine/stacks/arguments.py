"""What a matrix rule is given for some rows of a stack, and what is kept of its results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from hbcore.engine.graph.purity import Purity
from hbcore.engine.stacks.absent import Absent
from hbcore.engine.stacks.drawing import Drawing
from hbcore.engine.stacks.inner_segment import InnerSegment, Place, place_of
from hbcore.engine.stacks.stack import Part
from hbcore.engine.stacks.stack_state import Rows, StackState, WatchedState
from hbcore.engine.stacks.turn import Turn
from hbcore.errors import RuleError
from hbcore.rules.author_errors import naming
from hbcore.rules.contract import checked, title, unknown_slot
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.row_noise import normal, uniform
from hbcore.rules.transform import Context, State, Transform, no_memory


class Arguments:
    """What a rule is given for one part, and what is kept of its results."""

    def __init__(self, turn: Turn, part: Part) -> None:
        self._turn, self.part = turn, part
        stack, rows = part.stack, part.rows
        self.stack = stack
        self._stored: Mapping[str, Tensor] = stack.stored if rows is None else Rows(stack.stored, rows)
        self._state = StackState(self._stored, stack, stack.slots, turn.carried)
        self._absent: dict[str, Any] = {name: Absent(turn.rule, name) for name in ("param", "grad", "hvp", "vector")}
        self._settled = StackState(self._stored, stack, stack.slots, {})
        self._dims = tuple(range(1, len(stack.key.shape) + 1))
        self._drawing = self._drawing_of(part)
        self._skip: Tensor | None = None
        self.nonfinite: Tensor | None = None
        self._inner: dict[tuple[Place, torch.dtype], InnerSegment | None] = {}
        self._placed: tuple[Transform, Transform, Place | None] | None = None
        self._context = Context(
            **self._absent,
            products=turn.tools.products(stack.key.device),
            step=turn.step_tensor,
            divide=turn.spec.divide,
            sum=self._sum,
            amax=self._amax,
            numel=torch.tensor(float(self._elements()), dtype=torch.float64, device="cpu"),
            probe=partial(self._drawing.draw, normal),
            noise=partial(self._drawing.draw, uniform),
            total=self._total,
        )
        self._context_settled = self._context._replace(**self._without("refresh", "apply"))

    def given(self) -> tuple[Tensor, State, Context]:
        """The arguments of the rule's ``update`` in this step."""
        stack, rows = self.part.stack, self.part.rows
        inputs = stack.inputs if rows is None else {name: t[rows] for name, t in stack.inputs.items()}
        self._drawing.begin(self._turn.rule.name, self._turn.step)
        context = self._context._replace(
            param=inputs.get("param", self._absent["param"]),
            grad=inputs.get("grad", self._absent["grad"]),
            refresh=self._turn.due.whole,
        )
        if stack.curvature is not None:
            context = context._replace(**self._pair())
        return inputs["update"], self._state, context._replace(apply=partial(self._apply, context), into=self._into)

    def settled(self) -> tuple[State, Context]:
        """The arguments of the rule's ``refresh`` in this step."""
        self._drawing.begin(f"{self._turn.rule.name}.refresh", self._turn.step)  # whatever update drew
        if self.stack.curvature is None:
            return self._settled, self._context_settled
        return self._settled, self._context_settled._replace(**self._pair())

    def _pair(self) -> dict[str, Any]:
        """The vectors and Hessian-vector products of this step; None where it has none."""
        if not self._turn.asks:
            return dict.fromkeys(("hvp", "vector"))
        rows, pair = self.part.rows, self.stack.pair
        return pair if rows is None else {name: t[rows] for name, t in pair.items()}

    def take(self, nonfinite: Tensor | None) -> None:
        """Take this step's flag: where it is above 0, nothing is kept."""
        self.nonfinite = nonfinite
        self._skip = None if nonfinite is None else nonfinite.to(self.stack.key.device) > 0

    def settled_watched(self, purity: Purity) -> tuple[State, Context]:
        """The same for a rule whose writes ``purity`` watches."""
        state, context = self.settled()
        purity.give(self._turn.rule, (*self.stack.stored.values(), *context))
        return WatchedState(self._turn.rule, state, purity, "refresh"), context

    def underived(self, purity: Purity) -> tuple[State, Context]:
        """The arguments of the rule's ``derive``, whose writes ``purity`` watches."""
        rule, stack = self._turn.rule, self.stack
        slots = {name: slot for name, slot in stack.slots.items() if not slot.derived}
        context = self._context._replace(**self._without("derive", "apply", "probe", "noise"))
        purity.give(rule, (*stack.stored.values(), *context))
        return WatchedState(rule, StackState(self._stored, stack, slots, {}), purity, "derive"), context

    def _without(self, method: str, *refused: str) -> dict[str, Any]:
        """The parts of the context that a method other than ``update`` has no use for."""
        rule = self._turn.rule
        absent = {name: Absent(rule, name, method) for name in self._absent}
        return {**absent, **{name: partial(_refuse, rule, method, name) for name in refused}}

    def keep_derived(self, new: Mapping[str, Tensor]) -> None:
        """Write what the rule's ``derive`` returned, also in a step that is skipped: it follows from what the rows have."""
        self._skip = None
        self.keep(new)
        self.stack.unknown.difference_update(self.part.places)

    def watched(self, purity: Purity) -> tuple[Tensor, State, Context]:
        """:meth:`given` for a rule whose writes ``purity`` watches, and what its inner rules return."""
        update, state, context = self.given()
        purity.give(self._turn.rule, (update, *self.stack.stored.values(), *context))
        watched = WatchedState(self._turn.rule, state, purity)

        def apply(inner: Transform, u: Tensor, s: State) -> tuple[Tensor, dict[str, Tensor]]:
            with purity.pause():
                segment = self._segment(inner, u, state if s is watched else s)
                if segment is not None:
                    return self._compiled(segment, u)
            with purity.within(inner, u), naming(inner):
                return checked(inner, inner.update(u, s, context), u, s, whole=False)

        return update, watched, context._replace(apply=apply, into=no_memory)

    def _into(self, name: str) -> Tensor | None:
        """The stack's memory, where it holds the very value that a rule returns."""
        stack = self.stack
        if self.part.rows is not None or self._skip is not None:
            return None
        if name == "update":
            found = stack.inputs[name]
        elif stack.stores_as_it_is(name):
            found = stack.stored[name]
        else:
            return None
        return found if found.dtype == compute_dtype(stack.key.dtype) else None

    def _apply(self, context: Context, inner: Transform, u: Tensor, s: State) -> tuple[Tensor, dict[str, Tensor]]:
        segment = self._segment(inner, u, s)
        return self._compiled(segment, u) if segment is not None else inner.update(u, s, context)

    def _segment(self, inner: Transform, u: Tensor, s: State) -> InnerSegment | None:
        """What runs ``inner`` on ``u``; None if it runs as it is written."""
        if s is not self._state or u.shape != (len(self.part.places), *self.stack.key.shape) or not u.is_contiguous():
            return None
        turn, placed = self._turn, self._placed
        if placed is None or placed[0] is not turn.rule or placed[1] is not inner:  # a rule is the same object for many steps
            placed = self._placed = (turn.rule, inner, place_of(turn.rule, inner))
        place = placed[2]
        if place is None:
            return None
        key = (place, u.dtype)
        if key not in self._inner:
            self._inner[key] = turn.tools.inner.find(turn.spec, turn.index, place, inner, u[0])
        return self._inner[key]

    def _compiled(self, segment: InnerSegment, u: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Run an inner rule that is compiled; it writes to the stack."""
        rows, stored = self.part.rows, self.stack.stored
        if rows is None:
            return segment.run(self.stack, u, stored, self._turn.row, self.nonfinite), Written(self._state)
        some = {name: stored[name][rows] for name in segment.kept(stored)}
        out = segment.run(self.stack, u, some, self._turn.row, self.nonfinite)
        for name, value in some.items():
            _put([(stored[name], value)], rows)
        return out, Written(self._state)

    def shapes(self) -> dict[str, Tensor]:
        """Tensors of the shapes of the rows' slots, and of what the group carries; without memory."""
        return {**self.slot_shapes(), **self._turn.carried}

    def slot_shapes(self) -> dict[str, Tensor]:
        """Tensors of the shapes of the rows' slots, without memory."""
        return {n: torch.empty((*self._rows(), *slot.shape), device="meta") for n, slot in self.part.stack.slots.items()}

    def keep(self, new: Mapping[str, Tensor], update: Tensor | None = None) -> dict[str, float]:
        """Write what the rule returned to the stack; return what the group carries."""
        stack, rows, carried = self.part.stack, self.part.rows, dict[str, float]()
        # Results that are views of this stack's memory are copied first: it is overwritten below. Rows are copies already.
        memory = _memory((*stack.inputs.values(), *stack.stored.values())) if rows is None else set()
        kept = [(name, self._apart(value, stack.stored.get(name), memory)) for name, value in self._settled_by(new)]
        written: list[tuple[Tensor, Tensor]] = []
        if update is not None:
            written.append((stack.inputs["update"], self._apart(update, stack.inputs["update"], memory)))
        for name, value in kept:
            if name in self._turn.carried:
                carried[name] = float(value)
                continue
            for target, stored in self._encoded(name, value):
                if stored is value:
                    written.append((target, stored))
                else:
                    _put([(target, stored)], rows)  # now, so that no two copies are held
        _put(written, rows)
        return carried

    @staticmethod
    def _apart(value: Tensor, target: Tensor | None, memory: set[int]) -> Tensor:
        """A result that writing others does not change: the very memory where it goes, or none of the stack's."""
        if target is not None and value.data_ptr() == target.data_ptr():
            same = value.shape == target.shape and value.stride() == target.stride() and value.dtype == target.dtype
            return target if same else value.clone()
        return value.clone() if _memory((value,)) <= memory else value

    def _settled_by(self, new: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
        """Without derived slots, if those that they follow from are rounded: then they follow from what was stored."""
        stack = self.stack
        if stack.derived.isdisjoint(new) or not any(map(stack.rounds, new)):
            return new.items()
        stack.outdate(self.part.places)
        return [(name, value) for name, value in new.items() if name not in stack.derived]

    def _encoded(self, name: str, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What a slot is stored in, and what goes there."""
        stack, turn = self.part.stack, self._turn
        if name not in stack.slots:
            raise RuleError(unknown_slot(turn.rule, name, stack.slots, "returned"))
        slot, spec = stack.slots[name], turn.spec
        codec, noise = stack.codecs[name], None
        if codec.rounds and (spec.stochastic or slot.dtype is not None) and not slot.derived:
            noise = self._drawing.rounding(name, (*self._rows(), *slot.shape), turn.step)
        for part, kept in codec.write(self._stored, name, value, noise).items():
            yield stack.stored[part], kept if self._skip is None else torch.where(self._skip, self._stored[part], kept)

    def _drawing_of(self, part: Part) -> Drawing:
        """What draws for the rows."""
        return Drawing(part, self._turn.tools.philox)

    def _rows(self) -> tuple[int, ...]:
        """What comes before the shape of a row."""
        return (len(self.part.places),)

    def _elements(self) -> int:
        """How many elements the reductions reduce."""
        return torch.Size(self.stack.key.shape).numel()

    def _total(self, x: Tensor) -> Tensor:
        return x

    def _sum(self, x: Tensor) -> Tensor:
        return x.sum(self._dims, keepdim=True) if self._dims else x  # no dimensions would mean all of them

    def _amax(self, x: Tensor) -> Tensor:
        return x.amax(self._dims, keepdim=True) if self._dims else x


class Written(dict[str, Tensor]):
    """The slots of an inner rule that wrote them itself: nothing is left to return, and what is asked for is read again."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    def __missing__(self, name: str) -> Tensor:
        return self._state[name]


def _refuse(rule: Transform, method: str, part: str, *_: Any) -> NoReturn:
    who = "only update can" if part == "apply" else f"{method} cannot: it returns the same whenever it is called"
    raise RuleError(f"{title(rule, method)} calls c.{part}, which {who}.")


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def _put(written: Iterable[tuple[Tensor, Tensor]], rows: Tensor | None) -> None:
    """Write values to tensors, or to some of their rows: what has the same dtypes at once."""
    alike: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, value in written:
        if rows is not None:
            target[rows] = value.to(target.dtype)
        elif value is not target:
            targets, values = alike.setdefault((target.dtype, value.dtype), ([], []))
            targets.append(target)
            values.append(value)
    for targets, values in alike.values():
        torch._foreach_copy_(targets, values)  # reads and writes whole words where copy_, between dtypes, does not
