"""What a flat rule is given: one vector, whose elements may lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.exchange import all_reduce
from hbcore.engine.stacks.arguments import Arguments, Part, Turn
from hbcore.engine.stacks.flat_stack import FlatStack


class FlatArguments(Arguments):
    """What a flat rule is given for one stack, all of it, and what is kept of its results."""

    stack: FlatStack

    def __init__(self, turn: Turn, part: Part) -> None:
        assert isinstance(part.stack, FlatStack) and part.rows is None
        self.stack = part.stack
        super().__init__(turn, part)

    def _rows(self) -> tuple[int, ...]:
        return ()

    def _elements(self) -> int:
        return self.stack.numel

    def _segment(self, *_: Any) -> None:
        """Rules within a flat one run as they are written."""

    def _total(self, x: Tensor) -> Tensor:
        return self._reduced(x, "sum")

    def _sum(self, x: Tensor) -> Tensor:
        return self._reduced(x.sum(), "sum")

    def _amax(self, x: Tensor) -> Tensor:
        return self._reduced(x.amax() if x.numel() else x.new_full((), float("-inf")), "amax")

    def _reduced(self, x: Tensor, how: str) -> Tensor:
        """Over the ranks, which all ask at once."""
        if self.stack.shards is None:
            return x
        whole = x.contiguous().clone()
        all_reduce(whole, how, self.stack.shards)
        return whole

    def _numbers(self, draw: Callable[..., Tensor], what: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """An element has the same numbers wherever it is: those of its parameter's key, by its place in the whole parameter.

        Parameters of which a rank has as many elements, from the same one on, are drawn together.
        """
        ranges = self.stack.ranges
        if not shape or shape[0] != self.stack.key.shape[0]:  # of the group, not of its elements
            return draw(self._keys(what, self.part.names[:1]), torch.Size(shape).numel(), device).view(tuple(shape))
        each = torch.Size(shape[1:]).numel()
        alike: dict[tuple[int, int], list[int]] = {}
        for row, r in enumerate(ranges):
            alike.setdefault((r.start * each if r.part else 0, r.part * each), []).append(row)
        made: Tensor | None = None
        for (start, count), rows in alike.items():
            keys = self._keys(what, [ranges[row].name for row in rows])
            drawn = draw(keys, start + count, device)[:, start:]
            if len(ranges) == 1:
                return drawn.reshape(tuple(shape))
            made = drawn.new_empty(tuple(shape)) if made is None else made
            places = [made[self.stack.elements(row)] for row in rows]
            torch._foreach_copy_(places, [x.view(place.shape) for x, place in zip(drawn.unbind(), places, strict=True)])
        assert made is not None
        return made
