"""The layout of the tables that a program's functions read."""

from __future__ import annotations

from hbcore.engine.backends.table_layout import TableLayout


class FunctionLayout(TableLayout):
    """``table`` has a row per tensor: a pointer per column, then the element count, the first chunk, the number of chunks, the
    part's offset in the whole tensor, and the whole tensor's element count. ``moving`` holds what may change between steps,
    each for all tensors: gradient pointers, rows of scalars, then the keys of each noise input.
    """

    @property
    def width(self) -> int:
        """Entries in a table row."""
        return len(self.columns) + 5
