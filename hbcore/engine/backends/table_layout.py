"""What generated code finds where: the part that kernels and C++ functions have in common, fixed by the program alone."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import Self

from hbcore.engine.graph.program import NOISE, Program


@dataclass(frozen=True)
class TableLayout:
    """The columns of a table that has a row for each tensor, and the indices of numbers and reductions.

    Attributes:
        columns: stored tensors, in the table's order; gradients are not among them, since they move between steps.
        scalars: numbers in a row of scalars.
        reductions: those of all phases, by index.
        noise: random inputs that have a key (:attr:`Program.keyed`).
    """

    columns: tuple[str, ...]
    scalars: int
    reductions: tuple[str, ...]
    noise: tuple[str, ...]

    @classmethod
    def of(cls, program: Program) -> Self:
        """The layout shared by all phases of ``program``."""
        columns = tuple(name for name in program.dtypes if name != "grad" and not name.startswith(NOISE))
        sums = dict.fromkeys(name for p in program.phases for name in (*p.sums, *(r.name for r in p.reduces)))
        reductions = tuple(name for name in sums if name not in program.dtypes)  # the rest are scalar slots
        return cls(columns, len(program.hoisted), reductions, program.keyed)
