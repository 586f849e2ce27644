"""Stacks: equally shaped blocks of many parameters in one tensor, for rules that see whole matrices.

A segment writes each parameter's update straight into the stack's rows, the rule runs over all rows at once, and the next
segment reads them there, so stacking costs nothing. The rule's slots lie in stacks too: ``state[p][name]`` is a view of the
parameter's rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hbcore.distributed.exchange import Transfer
from hbcore.distributed.placement import Shards
from hbcore.engine.group_scalars import Due
from hbcore.engine.offload import Twin, twins_of
from hbcore.engine.stacks.key import StackKey
from hbcore.rules.contract import slots_of
from hbcore.rules.noise import stream_key
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Slot, Transform
from hbcore.rules.views import Block
from hbcore.state.codec import StateCodec, part_name
from hbcore.state.codec_choice import codec_of, fitting, part_shape

LENT = ("cuda",)
"""Device types on which a stack has memory for its inputs only during a step. torch's allocator keeps what is given back there,
for the model's own use between steps; a CPU's would come back from the system page by page."""


class Stack:
    """The blocks of some parameters, row by row.

    Attributes:
        names: what each row's random numbers are drawn by.
        rule: the name of the rule that takes it.
        staggers: whether the rule's refreshes of its rows are spread over steps.
        curvature: how the rule has Hessian-vector products made; None if it needs none.
        reads: which of a group's numbers that rule reads, see :class:`~hbcore.engine.stacks.bound_rule.BoundRule`.
        inputs: what the segment before writes: ``update``, and what else the rule needs. The rule's result replaces ``update``.
        pair: ``vector`` and ``hvp``, like the inputs, while the rule runs in a step that has them.
        codecs: what stores each slot.
        stored: the slots as their codecs store them, ``[rows, *slot.shape]`` each, or ``[rows, *blocks]``.
        homes: those of which parameters' state has views: the same tensors, or those in host memory if state is offloaded.
        twins: in that case, the way between the two.
        derived: the slots that follow from the others, and have no place in the parameters' state.
        unknown: the rows of which those have to be computed before the rule's next update.
        checked: the rule's methods that ran on it and were seen to be pure, and to return what they may.
    """

    def __init__(
        self, key: StackKey, rule: Transform, feeds: Mapping[str, torch.dtype], names: list[str], reads: tuple[int, ...]
    ) -> None:
        self.key, self.names, self.rule, self.reads = key, names, rule.name, reads
        self.staggers = rule.staggers
        self.curvature = rule.curvature if "hvp" in rule.needs else None
        self.pair: dict[str, Tensor] = {}
        self.slots = self._slots(rule)
        self.codecs = {name: self._codec(name, slot) for name, slot in self.slots.items()}
        self.derived = frozenset(name for name, slot in self.slots.items() if slot.derived)
        self.unknown: set[int] = set()
        self._keys: dict[str, Tensor] = {}
        self._writes: dict[int, list[int]] = {}
        self.checked: set[str] = set()
        rows = self._rows()
        self.inputs = {n: torch.zeros(*rows, *key.shape, dtype=d, device=key.device) for n, d in feeds.items()}
        self._addresses = list(map(Tensor.data_ptr, self.inputs.values()))
        self.stored: dict[str, Tensor] = {}
        self.homes: dict[str, Tensor] = {}
        self.twins: dict[str, Twin] = {}
        for name, slot in self.slots.items():
            blank = self._blank(name, slot, rows)
            if not slot.derived:
                self.homes.update(blank)
                self.twins.update(twins_of(self.homes, blank, key.device) if key.offloaded else {})
            self.stored.update({part: self.twins[part].tensor if part in self.twins else t for part, t in blank.items()})
        self._layouts = {name: (t.storage_offset(), t.shape, t.stride()) for name, t in self.homes.items()}
        self.outdate(range(len(names)))

    def open(self) -> bool:
        """Take memory for the inputs, uninitialised; return whether it lies elsewhere than in the last step."""
        if self.key.device.type in LENT:
            for t in self.inputs.values():
                t.untyped_storage().resize_(t.numel() * t.element_size())
        before, self._addresses = self._addresses, list(map(Tensor.data_ptr, self.inputs.values()))
        return self._addresses != before

    def close(self) -> None:
        """Give the memory back. Views of the inputs stay valid, and have memory again when the stack opens."""
        self.pair = {}
        if self.key.device.type in LENT:
            for t in self.inputs.values():
                t.untyped_storage().resize_(0)

    def asks(self, due: Due) -> bool:
        """Whether the rule has Hessian-vector products in a step."""
        return self.curvature is not None and due.asks(self.curvature.interval)

    def lend(self) -> None:
        """Leave the slots' memory to the views that parameters have of it: whoever has those may free it, or write there."""
        self.stored.clear()
        self.homes.clear()
        self.outdate(range(len(self.names)))

    def recall(self, state: Mapping[str, Tensor], k: int, runs: int) -> None:
        """Find the slots' memory again, by the state of a parameter whose run ``k`` of ``runs`` lies here."""
        if self.stored:
            return
        for name, key in self.keys(k, runs).items():
            view = state[key]
            self.homes[name] = view.new_empty(0).set_(view.untyped_storage(), *self._layouts[name])
            self.stored[name] = self.twins[name].tensor if name in self.twins else self.homes[name]
        for name in self.derived:
            self.stored.update(self._blank(name, self.slots[name], self._rows()))

    def outdate(self, rows: Iterable[int]) -> None:
        """Have the derived slots of rows computed before the rule's next update."""
        if self.derived:
            self.unknown.update(rows)

    def look(self, rows: range, held: Sequence[Tensor]) -> None:
        """Outdate rows of a parameter whose state tensors ``held`` were written to since this was last asked.

        The engine does not write to those tensors, but to others of the same memory.
        """
        writes = [t._version for t in held]
        if self._writes.get(rows.start, writes) != writes:
            self.outdate(rows)
        self._writes[rows.start] = writes

    def keys(self, k: int, runs: int) -> dict[str, str]:
        """Stored tensor -> its name in the state of a parameter whose run ``k`` of ``runs`` lies here."""
        dtype, found = compute_dtype(self.key.dtype), dict[str, str]()
        for name, slot in self.slots.items():
            if slot.derived:
                continue
            codec = self.codecs[name]
            found.update(zip(codec.parts(name, dtype), codec.parts(part_name(name, k, runs), dtype), strict=True))
        return found

    def stores_as_it_is(self, name: str) -> bool:
        """Whether the stored tensor is the slot's value, in the compute dtype."""
        dtype = compute_dtype(self.key.dtype)
        return self.codecs[name].parts(name, dtype) == {name: dtype}

    def keys_for(self, what: str) -> Tensor:
        """The keys that rows draw by for one purpose, int64 ``[rows]`` on the stack's device; made once."""
        if what not in self._keys:
            keys = [stream_key(name, what) for name in self.names]
            self._keys[what] = torch.tensor(keys, dtype=torch.int64, device=self.key.device)
        return self._keys[what]

    def rounds(self, name: str) -> bool:
        """Whether a slot, not a derived one, may change as it is written: it is stored otherwise than in the compute dtype."""
        return name in self.slots and not self.slots[name].derived and not self.stores_as_it_is(name)

    def _slots(self, rule: Transform) -> dict[str, Slot]:
        """The slots of one row."""
        return slots_of(rule, torch.empty(self.key.shape, dtype=self.key.dtype, device="meta"))

    def _codec(self, name: str, slot: Slot) -> StateCodec:
        """What stores a slot."""
        return codec_of(name, slot, fitting(self.key.spec.codec, slot.shape))

    def _rows(self) -> tuple[int, ...]:
        """What comes before the shape of a row."""
        return (len(self.names),)

    def _blank(self, name: str, slot: Slot, rows: tuple[int, ...]) -> dict[str, Tensor]:
        codec, dtype, device = self.codecs[name], compute_dtype(self.key.dtype), self.key.device
        blank = {
            part: torch.zeros((*rows, *part_shape(codec, name, part, slot.shape)), dtype=d, device=device)
            for part, d in codec.parts(name, dtype).items()
        }
        shape = (*rows, *slot.shape)
        filled = torch.full(shape, slot.fill, dtype=dtype, device=device) if slot.fill else None
        return blank if filled is None else codec.write(blank, name, filled)


class Part(NamedTuple):
    """Rows of one stack that take the same step.

    Attributes:
        rows: which of the stack's rows; None for all of them.
        places: the same on the host, always.
    """

    stack: Stack
    rows: Tensor | None
    places: Sequence[int]

    @property
    def names(self) -> list[str]:
        """What the rows' random numbers are drawn by."""
        return [self.stack.names[row] for row in self.places]

    def only(self, some: Sequence[int]) -> Part | None:
        """Some of the rows, by their places among these; None if there are none."""
        if len(some) == len(self.places):
            return self
        places = [self.places[i] for i in some]
        return Part(self.stack, torch.tensor(places, device=self.stack.key.device), places) if some else None


@dataclass(eq=False)
class StackView:
    """Where one matrix rule sees a parameter: for each run of blocks, the stack and the first row there.

    Attributes:
        shape: the parameter's.
        runs: ``(block, stack, first row)``.
        scratch: what the segments write and read if the blocks lie in several stacks; empty if they lie in one.
    """

    shape: torch.Size
    runs: list[tuple[Block, Stack, int]]
    scratch: dict[str, Tensor] = field(default_factory=dict)

    def column(self, name: str) -> Tensor:
        """What the segments see of the stacks' input ``name``: a tensor of the parameter's shape."""
        if len(self.runs) == 1:  # a region is never alone
            [(block, stack, row)] = self.runs
            return stack.inputs[name][row : row + block.batch].view(self.shape)
        if name not in self.scratch:
            like = self.runs[0][1].inputs[name]
            self.scratch[name] = torch.zeros(self.shape, dtype=like.dtype, device=like.device)
        return self.scratch[name]

    def scatter(self) -> None:
        """Copy what a segment wrote to the stacks, where it did not write there itself."""
        for name, whole in self.scratch.items():
            for block, stack, row in self.runs:
                stack.inputs[name][row : row + block.batch].copy_(block.of(whole))

    def gather(self) -> None:
        """Copy the stacks' results to where the next segment reads them."""
        if "update" in self.scratch:
            for block, stack, row in self.runs:
                block.of(self.scratch["update"]).copy_(stack.inputs["update"][row : row + block.batch])

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Have the stacks find their memory again, by the parameter's own state tensors."""
        for k, (_, stack, _) in enumerate(self.runs):
            stack.recall(state, k, len(self.runs))

    def state(self) -> dict[str, Tensor]:
        """The parameter's own state tensors: views of stack rows, numbered by run where there are several."""
        views: dict[str, Tensor] = {}
        for k, (block, stack, row) in enumerate(self.runs):
            for name, key in stack.keys(k, len(self.runs)).items():
                home = stack.homes[name]
                view = home[row] if block.batch == 1 else home[row : row + block.batch]
                views[key] = view.data  # which does not keep the whole stack alive, and whose version counts others' writes
        return views


@dataclass(eq=False)
class ShardedView:
    """Where one matrix rule sees a sharded parameter: whole, on its owner.

    Attributes:
        shards: how it is sharded.
        owner: the rank that runs the rule on it.
        inner: the view on the owner; one without runs elsewhere.
        part: this rank's part of the parameter.
        feeds: what the rule reads, and in which dtypes.
    """

    shards: Shards
    owner: int
    inner: StackView
    part: Tensor
    feeds: Mapping[str, torch.dtype]
    scratch: dict[str, Tensor] = field(default_factory=dict)

    @property
    def runs(self) -> list[tuple[Block, Stack, int]]:
        """As :attr:`StackView.runs`; none on ranks that do not own the parameter."""
        return self.inner.runs

    def column(self, name: str) -> Tensor:
        """What the segments see: a tensor of the shape of this rank's part."""
        if name not in self.scratch:
            self.scratch[name] = torch.zeros_like(self.part, dtype=self.feeds[name], requires_grad=False)
        return self.scratch[name]

    def transfer(self, name: str) -> Transfer:
        """One of the rule's inputs, or its result, on its way between ranks and owner."""
        whole = self.inner.column(name).view(-1) if self.inner.runs else None
        return Transfer(self.column(name).view(-1), whole, self.owner, self.shards.sizes())

    def state(self) -> dict[str, Tensor]:
        """As :meth:`StackView.state`."""
        return self.inner.state()
