"""What rules return, checked where it returns: chains, slots, updates. Every message names the rule, its class and its line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import RuleError
from hbcore.rules.declared import check_instance, inner, kind, lines_of
from hbcore.rules.domain import Domain
from hbcore.rules.route import Route
from hbcore.rules.slot_checks import check_slot
from hbcore.rules.transform import Slot, Transform
from hbcore.rules.views import Block, covers

RESERVED = ("param", "grad", "update", "step", "numel")
"""Names that segments and ``state[p]`` use themselves."""
PREFIXES = ("noise.", "stack.", "carried.")
"""What the names of a segment's other inputs begin with."""


def named(t: Transform) -> str:
    """What messages call a rule whose line they know from elsewhere: ``rule 'lion' (ScaleByLion)``."""
    return f"rule {t.name!r} ({type(t).__name__})"


def title(t: Transform, method: str = "update") -> str:
    """What messages call a rule: ``file:line: rule 'lion' (ScaleByLion.update)``."""
    cls = type(t)
    return f"{lines_of(getattr(cls, method))}rule {t.name!r} ({cls.__name__}.{method})"


def transforms_of(returned: Any, function: Callable[..., Any]) -> tuple[Transform, ...]:
    """What ``chain(h)`` returned, as a tuple of rules that are fit to run.

    Raises:
        RuleError: it is not a sequence of rules, or one of them breaks the protocol.
    """
    where = f"{lines_of(function)}{getattr(function, '__qualname__', 'chain')}"
    if not isinstance(returned, (tuple, list)):
        raise RuleError(f"{where} returned {kind(returned)}; return a tuple of rules: return (rule,).")
    for t in returned:
        _check_rule(t, where)
    return tuple(returned)


def slots_of(t: Transform, param: Tensor) -> dict[str, Slot]:
    """The slots of a rule for ``param``: a whole parameter, or for a matrix rule a tensor of a block's shape.

    Raises:
        RuleError: ``slots`` did not return a dict of slots, or one has a name or a shape that is not supported.
    """
    slots = t.slots(param)
    if not isinstance(slots, Mapping):
        raise RuleError(f"{title(t, 'slots')} returned {kind(slots)}; return a dict of slots by name: {{'m': zeros(param)}}.")
    for name, slot in slots.items():
        _check_name(t, name)
        if not isinstance(slot, Slot):
            raise RuleError(f"{title(t, 'slots')}: the slot {name!r} is {kind(slot)}; return zeros(param) or Slot(shape).")
        check_slot(t, f"{title(t, 'slots')}: the slot {name!r}", slot, param)
    return dict(slots)


def slot_names(t: Transform, param: Tensor) -> set[str]:
    """The names of a rule's slots for ``param``; a matrix rule's are asked for with each shape of its blocks.

    Raises:
        RuleError: as :func:`slots_of` does, and where blocks do not add up to the parameter.
    """
    if t.domain != Domain.MATRIX:
        return {*slots_of(t, param)}
    shapes = dict.fromkeys(block.shape for block in blocks_of(t, param.shape))
    return {name for shape in shapes for name in slots_of(t, block_like(shape, param))}


def blocks_of(t: Transform, shape: torch.Size) -> tuple[Block, ...]:
    """How a matrix rule cuts a parameter of ``shape``.

    Raises:
        RuleError: ``blocks`` did not return blocks, or some that are not the whole parameter.
    """
    if type(t).blocks is Transform.blocks:
        raise RuleError(f"{named(t)} is of Domain.MATRIX and does not define blocks(shape).")
    blocks: Any = t.blocks(shape)
    if not isinstance(blocks, (tuple, list)) or not all(isinstance(b, Block) for b in blocks):
        raise RuleError(f"{title(t, 'blocks')} returned {kind(blocks)}; return a tuple of Blocks, as matrix_view does.")
    if not covers(blocks, shape):
        raise RuleError(
            f"{title(t, 'blocks')} cuts shape {tuple(shape)} into {', '.join(map(str, blocks))}; blocks follow one another, or "
            "are regions that do not overlap, and together are the whole parameter."
        )
    return tuple(blocks)


def scalar_names(t: Transform) -> set[str]:
    """The names of the numbers that a group carries for a rule.

    Raises:
        RuleError: ``scalars`` did not return a dict of numbers by name.
    """
    scalars: Any = t.scalars()
    if not isinstance(scalars, Mapping) or not all(isinstance(v, (Real, Tensor)) for v in scalars.values()):
        what = kind(scalars) if not isinstance(scalars, Mapping) else f"the values {[*scalars.values()]}"
        raise RuleError(f"{title(t, 'scalars')} returned {what}; return a dict of numbers by name: {{'weight_sum': 0.0}}.")
    for name in scalars:
        _check_text(t, name, "scalars")
    return {*scalars}


class Slots(dict[str, Tensor]):
    """A rule's state, by slot."""

    def __init__(self, t: Transform, values: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self._rule = t

    def __missing__(self, name: str) -> Tensor:
        raise RuleError(unknown_slot(self._rule, name, self, "reads"))


def unknown_slot(t: Transform, name: str, known: Mapping[str, Any], does: str, method: str = "update") -> str:
    """The message for a slot that a rule's method ``does`` ("reads", "returned") without having it."""
    return f"{title(t, method)} {does} {name!r}, which is not one of its slots {sorted(known)}; declare it in slots(param)."


def pair(t: Transform, returned: Any) -> tuple[Any, Any]:
    """What ``update`` returned, as an update and its slots.

    Raises:
        RuleError: it is something else.
    """
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise RuleError(f"{title(t)} returned {kind(returned)}; return the update and a dict of the slots' new values.")
    return returned


def checked(t: Transform, returned: Any, update: Tensor, state: Mapping[str, Tensor], whole: bool = True) -> tuple[Tensor, Any]:
    """The new update and slot values of a rule that was given ``update`` and ``state``.

    Args:
        t: the rule.
        returned: what its ``update`` returned.
        update, state: what it was given.
        whole: whether every slot must be among the new values, as elementwise rules do.

    Raises:
        RuleError: they are not what the rule's slots and the parameter's shape ask for.
    """
    new_update, new = pair(t, returned)
    if not isinstance(new_update, Tensor):
        raise RuleError(f"{title(t)} returned {kind(new_update)} for an update; return a tensor of the update's shape.")
    if new_update.shape != update.shape:
        raise RuleError(
            f"{title(t)} returned an update of shape {tuple(new_update.shape)} where it was given {_shape(update)}; an update "
            "keeps its shape."
        )
    if new_update.is_complex() and not update.is_complex():
        raise RuleError(f"{title(t)} returned a complex update; take its real part, or what else is meant.")
    check_state(t, new, state, whole)
    return new_update, new


def check_state(t: Transform, new: Any, state: Mapping[str, Tensor], whole: bool, method: str = "update") -> None:
    """Raise :class:`RuleError` unless ``new`` has the values of slots that ``t`` has, each in the slot's shape."""
    if not isinstance(new, Mapping):
        raise RuleError(f"{title(t, method)} returned {kind(new)} for its slots; return a dict of their new values by name.")
    for name, value in new.items():
        if name not in state:
            raise RuleError(unknown_slot(t, name, state, "returned", method))
        if not isinstance(value, Tensor):
            raise RuleError(f"{title(t, method)} returned {kind(value)} for the slot {name!r}; return a tensor.")
        if value.is_complex() and not state[name].is_complex():
            raise RuleError(f"{title(t, method)} returned a complex value for the slot {name!r}; slots are real.")
        if value.shape != state[name].shape and not state[name].ndim and value.ndim:
            raise RuleError(
                f"{title(t, method)} returned shape {tuple(value.shape)} for the slot {name!r}, which is one number; reduce it "
                "with c.sum, c.mean, c.norm or c.amax."
            )
        if value.shape != state[name].shape:
            raise RuleError(
                f"{title(t, method)} returned shape {tuple(value.shape)} for the slot {name!r}, whose shape is "
                f"{_shape(state[name], value)}; a new value has the shape of its slot."
            )
    if whole and (missing := [name for name in state if name not in new]):
        raise RuleError(
            f"{title(t, method)} returned no value for the slot {missing[0]!r}; return every slot, s[{missing[0]!r}] where it "
            "does not change."
        )


def _shape(expected: Tensor, found: Tensor | None = None) -> str:
    """A shape for messages. Tracing has one-dimensional tensors without memory, whose length says nothing to an author."""
    traced = (expected if found is None else found).device.type == "meta" and expected.ndim == 1
    return f"{tuple(expected.shape)}{' (rules are traced on one-dimensional tensors)' if traced else ''}"


def _check_rule(t: Any, where: str) -> None:
    """Check a rule and those within it."""
    if isinstance(t, type) and issubclass(t, Transform):
        raise RuleError(f"{where}: the class {t.__name__} is in the chain; make a rule of it: {t.__name__}(...).")
    if not isinstance(t, Transform):
        raise RuleError(f"{where}: {kind(t)} is in the chain; a chain is made of Transforms.")
    check_instance(f"{where}: {named(t)}", t)
    if isinstance(t, Route):
        for branch in (t.then, t.otherwise):
            for each in branch:
                _check_rule(each, where)
        return
    _check_methods(t)
    for each in _within(t):
        _check_rule(each, where)


def _within(t: Transform) -> Iterator[Transform]:
    if is_dataclass(t):
        for f in fields(t):
            yield from (v for v in inner(getattr(t, f.name)) if isinstance(v, Transform))


def _check_name(t: Transform, name: Any) -> None:
    _check_text(t, name, "slots")
    if name in RESERVED or name.startswith(PREFIXES):
        raise RuleError(
            f"{title(t, 'slots')}: a slot cannot be called {name!r}; the engine uses {', '.join(RESERVED)}, and names that "
            f"begin with {', '.join(PREFIXES)}, itself. Rename it."
        )


def _check_text(t: Transform, name: Any, method: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[^\W\d][\w.]*", name):
        raise RuleError(
            f"{title(t, method)}: {name!r} is not the name of a {method[:-1]}; names are made of letters, digits, underscores "
            "and dots, as in 'exp_avg'."
        )


def _check_methods(t: Transform) -> None:
    """Check that a rule defines what it announces, and a matrix rule's answers that need no parameter."""
    where, cls = named(t), type(t)
    if cls.update is Transform.update and cls.update_stacks is Transform.update_stacks:
        raise RuleError(f"{where} does not define update(u, s, c).")
    if t.primes and (t.domain != Domain.MATRIX or cls.prime is Transform.prime):
        raise RuleError(f"{where} has primes = True, which is for rules of Domain.MATRIX that define prime(u, s, c).")
    if t.domain == Domain.MATRIX:
        rate: Any = t.rate(1)
        if not isinstance(rate, Real) or not 0 <= float(rate) <= 1:
            raise RuleError(f"{title(t, 'rate')} returned {rate!r} for step 1; return a number in [0, 1].")


def tensors_in(t: Transform) -> Iterator[Any]:
    """The tensors among a rule's hyperparameters, its inner rules' too."""
    for f in fields(t):
        for value in inner(getattr(t, f.name)):
            if isinstance(value, Transform):
                yield from tensors_in(value)
            elif isinstance(value, Tensor):
                yield value


def block_like(shape: tuple[int, ...], param: Tensor) -> Tensor:
    """What a matrix rule's ``slots`` is asked with: a tensor of a block's shape, without memory."""
    return torch.empty(shape, dtype=param.dtype, device="meta")
