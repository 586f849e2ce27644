"""Flat stacks: parameters end to end in one vector, for rules that see a whole group; see :mod:`hbcore.rules.flat`.

A row of a flat stack is a parameter: a range of elements of its inputs, and of its slots but the shared ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from hbcore.distributed.placement import Shards, spread_rows
from hbcore.engine.stacks.key import StackKey
from hbcore.engine.stacks.stack import ShardedView, Stack, StackView
from hbcore.rules.contract import slots_of
from hbcore.rules.flat import serial_name, stretched, with_serial
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Slot, Transform
from hbcore.rules.views import Block
from hbcore.state.codec import StateCodec
from hbcore.state.codec_choice import codec_of, fitting


class Range(NamedTuple):
    """One parameter's elements in a flat stack.

    Attributes:
        name: what its random numbers are drawn by.
        part: the parameter's elements that this rank has.
        start: how many of its elements other ranks have before those.
        whole: how many it has in all.
    """

    name: str
    part: int
    start: int
    whole: int


class FlatStack(Stack):
    """Some parameters of one group, device and dtype in one vector ``[N]``; ``key.shape`` is ``(N,)``.

    Args:
        like: any of the parameters, whole: what its slots have besides its shape, all have.
        shards: how they are sharded; None for whole ones.
        serial: which of its group's vectors it is.

    Attributes:
        ranges: each row's elements.
        numel: the elements of the whole parameters.
        serial: the name of the slot that says which vector it is.
    """

    def __init__(
        self,
        key: StackKey,
        rule: Transform,
        feeds: Mapping[str, torch.dtype],
        ranges: Sequence[Range],
        reads: tuple[int, ...],
        like: Tensor,
        shards: Shards | None,
        serial: int,
    ) -> None:
        self._like, self.shards, self.ranges = like, shards, ranges
        self.numel = sum(r.whole for r in ranges)
        self._ends = [0, *accumulate(r.part for r in ranges)]
        super().__init__(key, rule, feeds, [r.name for r in ranges], reads)
        self.serial = serial_name(rule)
        self.homes[self.serial].fill_(serial)

    def elements(self, row: int) -> slice:
        """Where a parameter's elements are."""
        return slice(self._ends[row], self._ends[row + 1])

    def idle(self, active: Iterable[int]) -> list[Tensor]:
        """Views of the inputs where parameters have no gradient."""
        rest = sorted({*range(len(self.ranges))} - {*active})
        return [t[self.elements(row)] for row in rest for t in self.inputs.values()]

    def _slots(self, rule: Transform) -> dict[str, Slot]:
        own = torch.empty(self._like.shape, dtype=self._like.dtype, device="meta")
        return stretched(with_serial(rule, slots_of(rule, own)), own.shape, self._ends[-1])

    def _codec(self, name: str, slot: Slot) -> StateCodec:
        return codec_of(name, slot, fitting(self.key.spec.codec, torch.Size()))  # one vector has no rows to cut blocks from

    def _rows(self) -> tuple[int, ...]:
        return ()


@dataclass(eq=False)
class FlatView:
    """Where one flat rule sees a parameter.

    Attributes:
        stack, row: the vector, and which of its parameters it is.
        param: the parameter.
        part: this rank's part of it.
    """

    stack: FlatStack
    row: int
    param: Tensor
    part: Tensor

    @property
    def runs(self) -> list[tuple[Block, Stack, int]]:
        """The one row, as other views have theirs."""
        return [(Block(0, 1, tuple(self.part.shape)), self.stack, self.row)]

    def column(self, name: str) -> Tensor:
        """What the segments see of the stack's input ``name``: a tensor of the shape of this rank's part."""
        return self.stack.inputs[name][self.stack.elements(self.row)].view(self.part.shape)

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Have the stack find its memory again, by the parameter's own state tensors."""
        self.stack.recall(state, 0, 1)

    def state(self) -> dict[str, Tensor]:
        """The parameter's own state tensors, and the shared ones; views of the stack's, sharded like the parameter."""
        return {
            name: t if name in self.shared() else spread_rows(t, self.param, t.shape[self.part.ndim :])
            for name, t in self.parts().items()
        }

    def parts(self) -> dict[str, Tensor]:
        """The same on this rank."""
        shared, found, where = self.shared(), dict[str, Tensor](), self.stack.elements(self.row)
        for name, home in self.stack.homes.items():
            view = home if name in shared else home[where].view((*self.part.shape, *home.shape[1:]))
            found[name] = view.detach()
        return found

    def shared(self) -> set[str]:
        """The names of the tensors that all parameters of the stack have in common."""
        codecs, dtype = self.stack.codecs, compute_dtype(self.stack.key.dtype)
        return {part for n, s in self.stack.slots.items() if s.shared for part in codecs[n].parts(n, dtype)}


View = StackView | ShardedView | FlatView
"""Where a matrix rule sees a parameter."""
