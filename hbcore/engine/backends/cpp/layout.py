"""The layout of the tables that a program's functions read; fixed by the program alone."""

from __future__ import annotations

from dataclasses import dataclass

from hbcore.engine.graph.program import NOISE, Program
from hbcore.state.blocks import BLOCK


@dataclass(frozen=True)
class TableLayout:
    """Columns of the table, and the indices of reductions.

    ``table`` has a row per tensor: a pointer per column, then the element count, the first chunk, the number of chunks, the
    part's offset in the whole tensor, and the whole tensor's element count. ``moving`` holds what may change between steps,
    each for all tensors: gradient pointers, rows of scalars, then the keys of each noise input.

    Attributes:
        columns: stored tensors, in the table's order.
        scalars: numbers in a row of scalars.
        reductions: those of all phases, by index.
        noise: random inputs that have a key.
        blocks: stored tensors with one entry per block of elements.
    """

    columns: tuple[str, ...]
    scalars: int
    reductions: tuple[str, ...]
    noise: tuple[str, ...]
    blocks: frozenset[str]

    @classmethod
    def of(cls, program: Program) -> TableLayout:
        """The layout shared by all phases of ``program``."""
        columns = tuple(name for name in program.dtypes if name != "grad" and not name.startswith(NOISE))
        sums = dict.fromkeys(name for p in program.phases for name in (*p.sums, *(r.name for r in p.reduces)))
        reductions = tuple(name for name in sums if name not in program.dtypes)  # the rest are scalar slots
        return cls(columns, len(program.hoisted), reductions, program.keyed, program.per_block)

    @property
    def width(self) -> int:
        """Entries in a table row."""
        return len(self.columns) + 5

    def every(self, name: str) -> int:
        """How many elements share an entry of a tensor."""
        return BLOCK if name in self.blocks else 1
