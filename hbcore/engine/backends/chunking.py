"""Split a batch into chunks, one graph call each. Split once and reused for the lifetime of the batch.

Each call costs microseconds regardless of size, and temporaries larger than the cache cost memory traffic. Small tensors are
therefore packed into one chunk, and the eager backend cuts large CPU tensors into slices that fit the cache. The tensors of a
pack share their scalars; where hundreds of groups have a few small tensors each, they share a pack nonetheless, and a scalar
that differs between them is spread over their elements. Reductions are per tensor, so in phases that compute or read one a
chunk never spans several tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hbcore.engine.backends.base import Batch
from hbcore.engine.graph.program import NOISE, Phase, Program
from hbcore.rules.numerics import compute_dtype

aten = torch.ops.aten

SMALL = 32_768
"""Tensors with fewer elements are packed. Packing larger ones costs more in copies than it saves in calls."""

SPREADING = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self, aten.minimum.default,
    aten.maximum.default,
}  # fmt: skip
"""Operations of an element and a 0-d number that give the same bits for a tensor of such numbers in the element's dtype."""


@dataclass(eq=False)
class Chunk:
    """Elements of one parameter's tensors: all, or a slice.

    Attributes:
        row: its row of scalars.
        index: the parameter's index in the batch.
        names: the graph's inputs.
        views: a flat view per input; None for gradients and noise, which are new tensors every step.
        targets: a flat view per tensor that the phase writes.
        start, length: the range of elements; a length of 0 means all of them.
    """

    row: int
    index: int
    names: Sequence[str]
    views: list[Tensor | None]
    targets: list[Tensor]
    start: int = 0
    length: int = 0

    def columns(self, batch: Batch, grads: Sequence[Tensor]) -> list[Tensor]:
        """The graph's inputs; ``grads`` are this step's gradients, flat."""
        columns: list[Tensor] = []
        for name, view in zip(self.names, self.views, strict=True):
            if view is not None:
                columns.append(view)
            elif name == "grad":
                grad = grads[self.index]
                columns.append(grad[self.start : self.start + self.length] if self.length else grad)
            else:
                length = self.length or batch.tensors["param"][self.index].numel()
                columns.append(batch.noise(name, self.index, self.start, length))
        return columns

    def write(self, values: Sequence[Tensor]) -> None:
        """Store what the phase computed, in the order of its writes."""
        for target, value in zip(self.targets, values, strict=False):
            target.copy_(value)


@dataclass(eq=False)
class Pack:
    """Several small parameters packed into one call.

    Attributes:
        row: the first parameter's row of scalars.
        rows: each parameter's, if they are not all the same.
        dtype: the compute dtype.
        index: the first parameter's index in the batch.
        names: the graph's inputs.
        members: the parameters' indices in the batch.
        sizes: the number of elements of each.
        parts: per input, the members' flat tensors; None for gradients and noise.
        targets: per tensor that the phase writes, the members' flat tensors.
    """

    row: int
    index: int
    names: Sequence[str]
    members: list[int]
    sizes: list[int]
    parts: list[list[Tensor] | None]
    targets: list[list[Tensor]]
    rows: list[int] | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._spread: dict[int, Spread] = {}
        # results pass through buffers whose views are made once: making a view of each result takes longer than copying it
        lengths = [[t.numel() for t in targets] for targets in self.targets]  # of blocks, where a codec has a number for each
        self._buffers = [t[0].new_empty(sum(some)) for t, some in zip(self.targets, lengths, strict=True)]
        self._results = [buffer.split_with_sizes(some) for buffer, some in zip(self._buffers, lengths, strict=True)]

    def columns(self, batch: Batch, grads: Sequence[Tensor]) -> list[Tensor]:
        """Like :meth:`Chunk.columns`, from concatenated copies of the members' tensors."""
        columns: list[Tensor] = []
        for name, parts in zip(self.names, self.parts, strict=True):
            if parts is None and name == "grad":
                parts = [grads[i] for i in self.members]
            elif parts is None:
                parts = [batch.noise(name, i, 0, n) for i, n in zip(self.members, self.sizes, strict=True)]
            columns.append(torch.cat(parts))
        return columns

    def write(self, values: Sequence[Tensor]) -> None:
        """Like :meth:`Chunk.write`."""
        for targets, buffer, results, value in zip(self.targets, self._buffers, self._results, values, strict=False):
            buffer.copy_(value)
            torch._foreach_copy_(targets, results)

    def numbers(self, phase: Phase, scalars: Sequence[Tensor], table: Sequence[Sequence[float]]) -> list[Tensor]:
        """The scalars of the phase's graph, for parameters of several rows.

        Args:
            phase: the phase to run.
            scalars: those of :attr:`row`, 0-d.
            table: the numbers of every row.
        """
        assert self.rows is not None
        values: list[Tensor] = []
        for i in phase.scalars:
            column = [table[row][i] for row in self.rows]
            if column.count(column[0]) == len(column):
                values.append(scalars[i])
                continue
            if i not in self._spread:
                self._spread[i] = Spread(self.sizes, self.dtype)
            values.append(self._spread[i].of(column))
        return values


class Spread:
    """A number for each of several flat tensors as one number for each of their elements, in their memory's order.

    Args:
        sizes: the number of elements of each.
        dtype: the numbers' dtype.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype) -> None:
        self._whole = torch.empty(sum(sizes), dtype=dtype, device="cpu")
        self._runs: list[tuple[int, int, Tensor]] = []
        first = start = 0
        for i, size in enumerate(sizes, start=1):
            if i == len(sizes) or sizes[i] != size:  # tensors of one size are filled together
                view = self._whole[start : start + (i - first) * size].view(i - first, size)
                self._runs.append((first, i, view))
                first, start = i, start + view.numel()

    def of(self, numbers: Sequence[float]) -> Tensor:
        """A tensor of the elements' numbers, which the next call overwrites."""
        column = torch.tensor(numbers, dtype=torch.float64, device="cpu").unsqueeze(1)
        for first, last, view in self._runs:
            view.copy_(column[first:last])
        return self._whole


def spreads(phase: Phase, dtypes: Mapping[str, torch.dtype], hoisted: Sequence[torch.dtype]) -> bool:
    """Whether a phase gives the same bits if its scalars are spread over the elements, see :class:`Spread`.

    Args:
        phase: the phase.
        dtypes: the program's tensors' dtypes.
        hoisted: its scalars' dtypes.
    """
    dtype = compute_dtype(dtypes["param"])
    inputs = [n for n in phase.graph.nodes if n.op == "placeholder"][len(phase.tensors) :]
    if phase.reduces or phase.sums or phase.needs_numel or any(hoisted[i] != torch.float64 for i in phase.scalars):
        return False
    for user in (user for scalar in inputs for user in scalar.users):
        if user.target not in SPREADING or user.kwargs or user.meta["dtype"] != dtype:
            return False
        operands = user.args[1:] if user.target is aten.where.self else user.args
        if not any(isinstance(n, fx.Node) and n.meta["kind"] == "element" and n.meta["dtype"] == dtype for n in operands):
            return False
    return True


def columns_of(phase: Phase) -> list[str]:
    """Every stored tensor used by the phase, once: those it reads, then those it only writes."""
    return [*phase.tensors, *(name for name in phase.writes if name not in phase.tensors)]


def chunks(
    program: Program, phase: Phase, batch: Batch, names: Sequence[str], largest: int | None = None, spread: bool = False
) -> list[Chunk | Pack]:
    """Split ``batch`` into chunks for one phase.

    Args:
        program: whose phase it is.
        phase: the phase to run.
        batch: a batch of dense tensors.
        names: the graph's inputs.
        largest: the maximum number of elements per chunk; None for whole tensors.
        spread: a pack may have several rows; on a CPU, where the phase :func:`spreads`.
    """
    stored = {n: batch.flat(n) for n in (*names, *phase.writes) if n != "grad" and not n.startswith(NOISE)}
    sizes = [t.numel() for t in batch.tensors["param"]]
    packs: dict[int, list[int]] = {}
    if not phase.reduces and not phase.sums and not phase.needs_numel:
        for i in (i for i, size in enumerate(sizes) if size < SMALL):
            packs.setdefault(batch.rows[i], []).append(i)
    chosen = list(packs.values())
    if spread:  # a spread scalar costs memory traffic, as much as a call only if there are few elements
        few = {row for row, members in packs.items() if sum(sizes[i] for i in members) < SMALL}
        chosen = [members for row, members in packs.items() if row not in few]
        chosen.append(sorted(i for row in few for i in packs[row]))
    made: list[Chunk | Pack] = []
    alone = set(range(len(sizes)))
    for members in chosen:
        if len(members) > 1:
            alone -= set(members)
            parts = [[stored[n][i] for i in members] if n in stored else None for n in names]
            targets = [[stored[n][i] for i in members] for n in phase.writes]
            rows = [batch.rows[i] for i in members]
            several, dtype = rows if len(set(rows)) > 1 else None, compute_dtype(batch.tensors["param"][0].dtype)
            lengths = [sizes[i] for i in members]
            made.append(Pack(rows[0], members[0], names, members, lengths, parts, targets, several, dtype))
    for i in sorted(alone):
        step = largest or sizes[i]
        for start in range(0, sizes[i], step):
            length = min(step, sizes[i] - start)
            at = program.length
            cut = {n: t[i] if length == sizes[i] else t[i][at(n, start) : at(n, start + length)] for n, t in stored.items()}
            views, targets_ = [cut.get(n) for n in names], [cut[n] for n in phase.writes]
            made.append(Chunk(batch.rows[i], i, names, views, targets_, start, 0 if length == sizes[i] else length))
    return made


class Chunked:
    """Cached chunks of a batch for each phase; rebuilt when the batch or its assignment of scalars changes.

    Args:
        program: whose phases run.
        names: the inputs of each phase's graph.
        largest, spread: see :func:`chunks`.
    """

    def __init__(
        self,
        program: Program,
        names: Sequence[Sequence[str]],
        largest: int | None = None,
        spread: Sequence[bool] | None = None,
    ) -> None:
        self._program, self._names, self._largest = program, names, largest
        self._spread = spread or [False] * len(program.phases)
        self._batch: Batch | None = None
        self._rows: list[int] | None = None
        self._cut: dict[int, list[Chunk | Pack]] = {}

    def forget(self) -> None:
        """Let go of the batch."""
        self._batch, self._rows, self._cut = None, None, {}

    def of(self, phase: int, batch: Batch) -> list[Chunk | Pack]:
        """The chunks for one phase of ``batch``."""
        if batch is not self._batch or batch.rows is not self._rows:
            self._batch, self._rows, self._cut = batch, batch.rows, {}
        if phase not in self._cut:
            p, names = self._program.phases[phase], self._names[phase]
            self._cut[phase] = chunks(self._program, p, batch, names, self._largest, self._spread[phase])
        return self._cut[phase]


def numbers(phase: Phase, batch: Batch, scalars: Sequence[Tensor], index: int) -> list[Tensor]:
    """The 0-d inputs of a phase's graph, which follow its columns.

    Args:
        phase: the phase to run.
        batch: the batch it runs over.
        scalars: the program's hoisted scalars for the parameter's row.
        index: the parameter's index, for its reductions and number of elements.
    """
    values = [scalars[i] for i in phase.scalars]
    for name in phase.sums:
        values.append(batch.summed(name, index))
    if phase.needs_numel:
        values.append(batch.numel(index))
    return values
