"""The backend interface: compile a program, and run its phases over a batch of parameters."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hbcore.engine.addresses import as_bytes
from hbcore.engine.graph.program import DRAW, Bits, Program
from hbcore.rules.noise import element_words, words


@dataclass(eq=False)
class Batch:
    """The parameters of one segment that have a gradient this step, stored by column.

    Attributes:
        tensors: stored tensor -> one tensor per parameter; includes ``param`` and ``grad``.
        rows: for each parameter, its row in ``values``.
        values: one row per distinct (group, step): the program's scalar inputs as numbers, or as 0-d tensors if they live on
            a device (``capturable=True``).
        sums: reduction -> one 0-d tensor per parameter; filled by the phases.
        whole: reduction over whole tensors -> the same as a vector, where it is made as one.
        keys: noise input -> each parameter's key for this step; of inputs that share a word, the first one's.
        bits: where inputs lie in words that they share.
        dense: whether every tensor is dense in memory, in any order of dimensions.
        model: reduction over the whole model -> its 0-d result, once every segment has contributed.
        moves: number of steps in which the addresses of stack inputs differed from the previous step.
        numels, starts: if the tensors are parts of larger ones, the size of each whole and the part's offset in it.
    """

    tensors: Mapping[str, list[Tensor]]
    rows: list[int]
    values: Sequence[Sequence[float | Tensor]]
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    model: dict[str, Tensor] = field(default_factory=dict)
    dense: bool = True
    keys: dict[str, list[int]] = field(default_factory=dict)
    moves: int = 0
    numels: list[float] | None = None
    starts: list[int] | None = None
    bits: Mapping[str, Bits] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    _word: tuple[Any, Tensor] | None = None
    _flat: dict[str, list[Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tensors["param"])

    def noise(self, name: str, i: int, start: int, length: int) -> Tensor:
        """Bits for elements ``start`` to ``start + length`` of parameter ``i``, in memory order.

        Returns:
            int32 with as many random bits as the input has, to round with; int64 with 64 where a rule draws.
        """
        start += self.starts[i] if self.starts else 0
        device = self.tensors["param"][i].device
        if name.startswith(DRAW):
            return words(self.keys[name][i], torch.arange(start, start + length, device=device))
        bits = self.bits[name]
        asked = (self.keys[bits.word][i], start, length, device)
        if self._word is None or self._word[0] != asked:  # the inputs of one word are asked for one after the other
            self._word = asked, element_words(*asked)
        return ((self._word[1] >> bits.shift) & ((1 << bits.width) - 1)).to(torch.int32)

    def flat(self, name: str) -> list[Tensor]:
        """A column's tensors, flattened in memory order. All but gradients are cached across steps."""
        if name == "grad":
            return [g.view(-1) if g.is_contiguous() else flat(g) for g in self.tensors[name]]
        if name not in self._flat:
            self._flat[name] = [flat(t) for t in self.tensors[name]]
        return self._flat[name]

    def lend(self) -> None:
        """Let go of views of the tensors, which are made again when needed."""
        self._flat.clear()
        self._word = None

    def numel(self, i: int) -> Tensor:
        """``c.numel`` for parameter ``i``: 0-d float64 on the host."""
        numel = self.numels[i] if self.numels else float(self.tensors["param"][i].numel())
        return torch.tensor(numel, dtype=torch.float64, device="cpu")

    def summed(self, name: str, i: int) -> Tensor:
        """The result of a reduction for parameter ``i``, over its tensor or over the model; or a scalar slot's value."""
        if name in self.model:
            return self.model[name]
        return self.sums[name][i] if name in self.sums else self.tensors[name][i]


class Executable(Protocol):
    """A compiled program.

    Attributes:
        compiles: number of kernels or graphs compiled so far.
    """

    compiles: int

    def prepare(self, batch: Batch) -> None:
        """Prepare for this step's numbers and gradients without writing to the batch's tensors.

        Computes the hoisted scalars, caches layouts that stay valid for the same batch object, uploads changed addresses, and
        compiles missing variants.

        Raises:
            CompileError: a new size or alignment is not supported on this machine.
        """

    def run(self, phase: int, batch: Batch) -> int:
        """Run one phase over the batch: write its tensors in place and add its reductions to ``batch.sums``.

        Returns:
            The number of kernels launched, 0 if not counted.
        """

    def forget(self) -> None:
        """Let go of views of the last batch's tensors; the next step makes them again."""


class Backend(Protocol):
    """A way to run programs. Stateless; raises :class:`hbcore.errors.CompileError` on machines that cannot run it."""

    name: str

    def compile(self, program: Program, batch: Batch) -> Executable:
        """Compile every phase without writing to the batch's tensors.

        Args:
            program: what to run.
            batch: an example; only read.

        Raises:
            CompileError: the backend does not support this machine or program; the message gives the reason.
        """


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as one dimension, in its own memory order, sharing its memory.

    Not an autograd view: torch.compile guards on the shape of a view's base and would recompile for each number of
    dimensions.
    """
    storage = tensor.untyped_storage()
    return tensor.new_empty(0).set_(storage, tensor.storage_offset(), (tensor.numel(),), (1,))


def packed(*columns: Iterable[int]) -> array[int]:
    """Integers of 64 bits, one column after the other; array's own constructor takes half as long again."""
    found = array("q")
    found.frombytes(as_bytes(*columns))
    return found


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda d: (d[1], d[0])):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
