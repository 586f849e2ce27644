"""What a matrix rule draws for some rows of a stack, and the noise that its slots are rounded with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hbcore.engine.stacks.flat_stack import FlatStack
from hbcore.engine.stacks.stack import Part
from hbcore.rules.row_noise import Philox, bits

Numbers: TypeAlias = Callable[[Tensor, int, int, int, Philox], Tensor]
"""``numbers(keys, numel, step, draw, philox)``, ``[rows, numel]``; see :mod:`hbcore.rules.row_noise`."""


class Drawing:
    """The random numbers of one part: by its rows' names, what they are for, the step and how many were drawn before.

    Args:
        part: the rows. Their keys stay on the device.
        philox: what makes the words on a CPU.
    """

    def __init__(self, part: Part, philox: Philox) -> None:
        self._part, self._philox = part, philox
        self._keys: dict[str, Tensor] = {}
        self._what, self._step, self._drawn = "", 0, 0

    def begin(self, what: str, step: int) -> None:
        """From here on a rule's method draws, whose stream is called ``what``."""
        self._what, self._step, self._drawn = what, step, 0

    def draw(self, numbers: Numbers, like: Tensor) -> Tensor:
        """The next ``numbers``, of the shape and dtype of ``like``, in 24 bits each."""
        self._drawn += 1
        return self._made(numbers, self._what, like.shape, self._step, self._drawn).to(like.device, like.dtype)

    def rounding(self, slot: str, shape: Sequence[int], step: int) -> Tensor:
        """What a codec rounds a slot with: int32 of ``shape`` in [0, 2^16)."""
        return self._made(bits, f"round.{slot}", shape, step, 0)

    def _made(self, numbers: Numbers, what: str, shape: Sequence[int], step: int, draw: int) -> Tensor:
        return numbers(self._keys_of(what), math.prod(shape[1:]), step, draw, self._philox).view(*shape)

    def _keys_of(self, what: str) -> Tensor:
        if what not in self._keys:
            keys = self._part.stack.keys_for(what)
            self._keys[what] = keys if self._part.rows is None else keys[self._part.rows]
        return self._keys[what]


class FlatDrawing(Drawing):
    """The same for a flat rule: an element has the same numbers wherever it is, by its place in the whole parameter."""

    def __init__(self, part: Part, stack: FlatStack, philox: Philox) -> None:
        super().__init__(part, philox)
        self._stack = stack
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def _made(self, numbers: Numbers, what: str, shape: Sequence[int], step: int, draw: int) -> Tensor:
        """Parameters of which a rank has as many elements, from the same one on, are drawn together."""
        ranges, keys = self._stack.ranges, self._keys_of(what)
        if not shape or shape[0] != self._stack.key.shape[0]:  # of the group, not of its elements
            return numbers(keys[:1], math.prod(shape), step, draw, self._philox).view(*shape)
        each = math.prod(shape[1:])
        alike: dict[tuple[int, int], list[int]] = {}
        for row, r in enumerate(ranges):
            alike.setdefault((r.start * each if r.part else 0, r.part * each), []).append(row)
        made: Tensor | None = None
        for (start, count), rows in alike.items():
            drawn = numbers(keys[self._places(rows)], start + count, step, draw, self._philox)[:, start:]
            if len(ranges) == 1:
                return drawn.reshape(*shape)
            made = drawn.new_empty(*shape) if made is None else made
            places = [made[self._stack.elements(row)] for row in rows]
            torch._foreach_copy_(places, [x.view(place.shape) for x, place in zip(drawn.unbind(), places, strict=True)])
        assert made is not None
        return made

    def _places(self, rows: Sequence[int]) -> Tensor:
        """Rows as an index on the device, which stays there."""
        key = tuple(rows)
        if key not in self._rows:
            self._rows[key] = torch.tensor(rows, device=self._stack.key.device)
        return self._rows[key]
