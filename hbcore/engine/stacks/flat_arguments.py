"""What a flat rule is given: one vector, whose elements may lie on several ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hbcore.distributed.exchange import all_reduce
from hbcore.engine.stacks.arguments import Arguments
from hbcore.engine.stacks.drawing import Drawing, FlatDrawing
from hbcore.engine.stacks.flat_stack import FlatStack
from hbcore.engine.stacks.stack import Part
from hbcore.engine.stacks.turn import Turn


class FlatArguments(Arguments):
    """What a flat rule is given for one stack, all of it, and what is kept of its results."""

    stack: FlatStack

    def __init__(self, turn: Turn, part: Part) -> None:
        assert isinstance(part.stack, FlatStack) and part.rows is None
        self.stack = part.stack
        super().__init__(turn, part)

    def _rows(self) -> tuple[int, ...]:
        return ()

    def _drawing_of(self, part: Part) -> Drawing:
        return FlatDrawing(part, self.stack, self._turn.tools.philox)

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
