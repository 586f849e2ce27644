"""One run of a matrix rule over rows of slabs: what the rule is given, and where its results go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.engine.stacks.stack import Slab, SlabKey
from hbcore.errors import RuleError
from hbcore.rules.division import Divide
from hbcore.rules.noise import bits, normal, uniform
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Context, Slot, State, Transform
from hbcore.state.codec import codec_of


class Part(NamedTuple):
    """Rows of one slab that take the same step.

    Attributes:
        rows: which of the slab's rows; None for all of them.
        names: what their random numbers are drawn by.
    """

    slab: Slab
    rows: Tensor | None
    names: list[str]


@dataclass(frozen=True)
class Turn:
    """One run of a rule.

    Attributes:
        step: the rows' step, 0-d float64 on the host.
        carried: what the group carries, 0-d float64 each.
    """

    rule: Transform
    step: Tensor
    refresh: bool
    priming: bool
    divide: Divide
    carried: Mapping[str, Tensor]
    key_of: Callable[[str, str, int], int]

    def run(self, parts: Sequence[Part]) -> list[dict[str, Tensor]]:
        """Run the rule over the parts, in place; return the new values of what the group carries, by each part."""
        sights = [Sight(self, part) for part in parts]
        with exact_products():
            if self.priming:
                return [sight.keep(self.rule.prime(*sight.given)) for sight in sights]
            results = self.rule.update_stacks([sight.given for sight in sights])
            # one that the rule computes when it is asked for is written before the next one takes memory
            return [sight.keep(new, update) for sight, (update, new) in zip(sights, results, strict=True)]

    def keys(self, names: list[str], what: str) -> Tensor:
        """A key for each row, int64."""
        return torch.tensor([self.key_of(name, what, int(self.step)) for name in names], dtype=torch.int64)


class Sight:
    """A part as the rule of a turn sees it.

    Attributes:
        given: the arguments of the rule's ``update``.
    """

    def __init__(self, turn: Turn, part: Part) -> None:
        self.turn, self.part = turn, part
        slab, rows = part.slab, part.rows
        self.stored: Mapping[str, Tensor] = slab.stored if rows is None else Rows(slab.stored, rows)
        self.inputs = slab.inputs if rows is None else {name: t[rows] for name, t in slab.inputs.items()}
        state = SlabState(self.stored, slab.slots, slab.key, turn.carried)
        self.given: tuple[Tensor, State, Context] = (self.inputs["update"], state, self._context())

    def keep(self, new: Mapping[str, Tensor], update: Tensor | None = None) -> dict[str, Tensor]:
        """Write what the rule returned to the slab; return what the group carries."""
        slab, shown = self.part.slab, set[int]()
        if self.part.rows is None:  # else the rule was given copies
            shown = {t.untyped_storage().data_ptr() for t in (*slab.inputs.values(), *slab.stored.values())}
        # what is a view of something that is written below is read before
        new = {n: v.clone() if v.untyped_storage().data_ptr() in shown else v for n, v in new.items()}
        if update is not None:
            update = update.clone() if update.untyped_storage().data_ptr() in shown else update
            _put(slab.inputs["update"], self.part.rows, update)
        carried = {name: value for name, value in new.items() if name in self.turn.carried}
        for name, value in new.items():
            if name not in carried:
                self._write(name, value)
        return carried

    def _write(self, name: str, value: Tensor) -> None:
        slab, turn = self.part.slab, self.turn
        if name not in slab.slots:
            raise RuleError(f"rule {turn.rule.name!r} returned {name!r}, which is none of its slots {sorted(slab.slots)}.")
        slot, recipe = slab.slots[name], slab.key.recipe
        noise = None
        if recipe.stochastic and not slot.exact and recipe.codec.rounds:
            keys = turn.keys(self.part.names, f"round.{name}")
            noise = bits(keys, slot.shape.numel(), slab.key.device).view(-1, *slot.shape)
        for part, kept in codec_of(slot, recipe.codec).write(self.stored, name, value, noise).items():
            _put(slab.stored[part], self.part.rows, kept)

    def _context(self) -> Context:
        turn, shape, draws = self.turn, self.part.slab.key.shape, list[int]()

        def drawn(draw: Callable[..., Tensor], like: Tensor) -> Tensor:
            draws.append(1)
            keys = turn.keys(self.part.names, f"{turn.rule.name}.{len(draws)}")
            return draw(keys, like[0].numel(), like.device).view(like.shape).to(like.dtype)

        absent: Any = Absent(turn.rule.name)
        dims = tuple(range(1, len(shape) + 1))
        context = Context(
            param=self.inputs.get("param", absent),
            grad=self.inputs.get("grad", absent),
            step=turn.step,
            divide=turn.divide,
            sum=lambda x: x.sum(dims, keepdim=True) if dims else x,  # no dimensions would mean all of them
            amax=lambda x: x.amax(dims, keepdim=True) if dims else x,
            numel=torch.tensor(float(torch.Size(shape).numel()), dtype=torch.float64, device="cpu"),
            refresh=turn.refresh,
            probe=lambda like: drawn(normal, like),
            noise=lambda like: drawn(uniform, like),
        )
        return context._replace(apply=lambda inner, u, s: inner.update(u, s, context))


class Rows(Mapping[str, Tensor]):
    """Some rows of stored tensors, copied when they are asked for: a rule reads one stack's state after the other's."""

    def __init__(self, whole: Mapping[str, Tensor], rows: Tensor) -> None:
        self._whole, self._rows = whole, rows

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[name][self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


class SlabState(Mapping[str, Tensor]):
    """A rule's slots as it sees them: decoded when they are asked for, and not before."""

    def __init__(
        self, stored: Mapping[str, Tensor], slots: Mapping[str, Slot], key: SlabKey, carried: Mapping[str, Tensor]
    ) -> None:
        self._stored, self._slots, self._key, self._carried = stored, slots, key, carried

    def __getitem__(self, name: str) -> Tensor:
        if name in self._carried:
            return self._carried[name]
        codec = codec_of(self._slots[name], self._key.recipe.codec)
        return codec.read(self._stored, name, compute_dtype(self._key.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter((*self._slots, *self._carried))

    def __len__(self) -> int:
        return len(self._slots) + len(self._carried)


class Absent:
    """Stands in for a part of the context that the rule did not ask for."""

    def __init__(self, rule: str) -> None:
        self._rule = rule

    def __getattr__(self, name: str) -> Any:
        raise RuleError(f"rule {self._rule!r} reads c.param or c.grad; say so with needs = frozenset({{'param', 'grad'}}).")


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, whatever the model asked torch for: TF32 would spoil a basis."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _put(target: Tensor, rows: Tensor | None, value: Tensor) -> None:
    if rows is None:
        torch._foreach_copy_([target], [value])  # reads and writes whole words where copy_, between dtypes, does not
    else:
        target[rows] = value.to(target.dtype)
