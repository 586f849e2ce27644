"""Flat rules: matrix rules that see all parameters of a group as one vector. Declare ``flat = True`` beside ``Domain.MATRIX``.

A parameter group's parameters of one device and dtype lie end to end, in the group's order, each in row-major order: N elements
in all. ``update(u, s, c)`` is given the update as ``[N]``, and may return anything of that shape. There are no blocks.

* A slot whose shape begins with the parameter's own, ``Slot((*param.shape, r), exact=True)``, is ``[N, r]`` in ``update``; what
  follows is the same for every parameter. A slot with ``shared=True``, of any small shape, is one for the whole vector.
* ``c.sum``, ``c.mean``, ``c.norm`` and ``c.amax`` reduce over the vector's elements, wherever they are, and ``c.numel`` is how
  many there are. Under FSDP2 each rank has its own rows of every parameter, so that N is its own number of elements; sums over
  them that are made otherwise, a product ``[r, N] @ [N, r]`` say, are added up by ``c.total``. Nothing of length N travels.
* ``c.noise(like)`` and ``c.probe(like)``, where ``like`` is ``[N, ...]``, are the same numbers for a parameter's element
  however it is sharded; where it is of another shape, they are the same on all ranks.
* ``c.into(name)`` is a slot's memory, where nothing else needs the old values: the rule overwrites it and returns it as the
  slot's new value. Without it, a new ``[N, r]`` would be held beside the old one.
* ``c.step`` is the largest count of the parameters' steps. Those without a gradient are zeros in ``u``, and do not move; in a
  step in which none has one, the rule does not run.

The vector is made of the parameters that have a gradient when the rule first runs. Any that come later, because they were
frozen or had no gradient before, are a vector of their own: all that come in one step together. The state says which one each
belongs to, so that a resumed run has the same ones. With ``multi_tensor=False`` each parameter is a vector of its own.

In ``state[p]`` slots have their declared shapes: views of the parameter's part, and for shared slots of the one there is. In a
state dict each parameter has a copy of these. Under FSDP2 the parts are sharded along the parameter's rows, as moments are.

A flat rule neither primes nor staggers, cannot be in a branch of ``Parallel``, and needs all gradients at once: gradient
release takes it with ``multi_tensor=False`` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from hbcore.errors import RuleError
from hbcore.rules.domain import Domain
from hbcore.rules.slot import Slot


def serial_name(rule: Any) -> str:
    """The name of the slot by which the state says which of a group's vectors a parameter belongs to: 1, 2, ...; 0 for none."""
    return f"{rule.name}.vector"


def with_serial(rule: Any, slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """A flat rule's slots and the engine's own."""
    return {**slots, serial_name(rule): Slot(torch.Size(()), shared=True)}


def stretched(slots: Mapping[str, Slot], shape: torch.Size, length: int) -> dict[str, Slot]:
    """What the slots of a parameter of ``shape`` are for a vector of ``length`` elements."""
    return {n: s if s.shared else replace(s, shape=torch.Size((length, *s.shape[len(shape) :]))) for n, s in slots.items()}


def check_rule(where: str, t: Any) -> None:
    """Raise :class:`RuleError` if a rule declares ``flat`` and what does not go with it; messages begin with ``where``."""
    if t.flat and (t.domain != Domain.MATRIX or t.primes or t.staggers):
        raise RuleError(
            f"{where} has flat = True, which is for rules of Domain.MATRIX that neither prime nor stagger; set domain = "
            "Domain.MATRIX, and start slots at the first step, where c.step is 1."
        )


def check_slot(where: str, t: Any, slot: Slot, shape: torch.Size) -> None:
    """Raise :class:`RuleError` if a rule's slot for a parameter of ``shape`` does not fit; messages begin with ``where``."""
    if slot.shared and not t.flat:
        raise RuleError(f"{where} is shared, which slots of flat rules may be; set flat = True, or leave shared out.")
    if t.flat and slot.derived:
        raise RuleError(f"{where} is derived, which slots of flat rules cannot be; compute it in update, or save it.")
    if t.flat and not slot.shared and tuple(slot.shape[: len(shape)]) != tuple(shape):
        raise RuleError(
            f"{where} has shape {tuple(slot.shape)} for a parameter of shape {tuple(shape)}; a slot of a flat rule begins "
            "with its parameter's shape, or is shared=True."
        )


def rests(t: Any, slots: Mapping[str, Slot], shape: torch.Size) -> dict[str, tuple[int, ...]]:
    """What follows the parameter's shape in each slot of a flat rule, which is the same for every parameter."""
    return {n: tuple(s.shape) if s.shared else tuple(s.shape[len(shape) :]) for n, s in slots.items()} if t.flat else {}
