"""A matrix rule's slots as it sees them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hbcore.engine.graph.purity import Purity
from hbcore.engine.stacks.stack import Stack
from hbcore.errors import RuleError
from hbcore.rules.contract import unknown_slot
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Slot, State, Transform


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


class StackState(Mapping[str, Tensor]):
    """A rule's slots as it sees them: decoded when they are asked for, and not before."""

    def __init__(
        self, stored: Mapping[str, Tensor], stack: Stack, slots: Mapping[str, Slot], carried: Mapping[str, Tensor]
    ) -> None:
        self._stored, self._stack, self._slots, self._carried = stored, stack, slots, carried

    def __getitem__(self, name: str) -> Tensor:
        if name in self._carried:
            return self._carried[name]
        if name not in self._slots:
            raise KeyError(name)
        return self._stack.codecs[name].read(self._stored, name, compute_dtype(self._stack.key.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter((*self._slots, *self._carried))

    def __len__(self) -> int:
        return len(self._slots) + len(self._carried)


class WatchedState(Mapping[str, Tensor]):
    """A rule's slots on its first run: it must not write to them, and must have those that it reads."""

    def __init__(self, rule: Transform, state: State, purity: Purity, method: str = "update") -> None:
        self._rule, self._state, self._purity, self._method = rule, state, purity, method

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise RuleError(unknown_slot(self._rule, name, self._state, "reads", self._method))
        value = self._state[name]
        self._purity.lend(value)
        return value

    def __contains__(self, name: object) -> bool:
        return name in {*self._state}

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in {*self._state} else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
