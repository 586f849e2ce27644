"""What a matrix rule draws for some rows of a stack, and the noise that its slots are rounded with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hbcore.engine.stacks.stack import Part
from hbcore.rules.row_noise import bits


class Drawing:
    """The random numbers of one part: by its rows' names, what they are for, the step and how many were drawn before.

    Args:
        part: the rows. Their keys stay on the device.
    """

    def __init__(self, part: Part) -> None:
        self._part = part
        self._keys: dict[str, Tensor] = {}
        self._what, self._step, self._drawn = "", 0, 0

    def begin(self, what: str, step: int) -> None:
        """From here on a rule's method draws, whose stream is called ``what``."""
        self._what, self._step, self._drawn = what, step, 0

    def draw(self, numbers: Callable[[Tensor, int, int, int], Tensor], like: Tensor) -> Tensor:
        """The next ``numbers(keys, numel, step, draw)``, of the shape and dtype of ``like``, in 24 bits each."""
        self._drawn += 1
        drawn = numbers(self._keys_of(self._what), like[0].numel(), self._step, self._drawn)
        return drawn.view(like.shape).to(like.device, like.dtype)

    def rounding(self, slot: str, shape: torch.Size, step: int) -> Tensor:
        """What a codec rounds a slot of ``shape`` with: int32 ``[rows, *shape]`` in [0, 2^16)."""
        return bits(self._keys_of(f"round.{slot}"), shape.numel(), step).view(-1, *shape)

    def _keys_of(self, what: str) -> Tensor:
        if what not in self._keys:
            keys = self._part.stack.keys_for(what)
            self._keys[what] = keys if self._part.rows is None else keys[self._part.rows]
        return self._keys[what]
