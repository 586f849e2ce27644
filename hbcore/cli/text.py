"""Text that fits the terminal: wrapped sentences and tables, in colour where rich is installed."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

LEAST = 24  # columns that the last cell of a row needs, to be worth its place beside the others
Line = Sequence[tuple[str, str]]
"""Pieces of one line, each with its style for rich: ``[("lr", "cyan"), ("  = 0.1", "")]``."""


def width() -> int | None:
    """Columns to fill: ``COLUMNS`` if it is set, else the terminal's; None, for any number, where the output is no terminal."""
    if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
        return max(shutil.get_terminal_size().columns, LEAST)
    return None


def show(lines: Iterable[Line]) -> None:
    """Print the lines; with their styles on a terminal, if rich is installed."""
    console = _console()
    for line in lines:
        if console is None:
            print("".join(text for text, _ in line))
        else:
            console(line)


def _console() -> Callable[[Line], None] | None:
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return None
    console = Console(soft_wrap=True, highlight=False)
    return lambda line: console.print(Text.assemble(*line), soft_wrap=True)


def wrapped(text: str, columns: int | None, first: str = "", rest: str | None = None) -> list[str]:
    """The text as lines of at most ``columns``, after ``first``; the later ones after ``rest``, by default as much space."""
    rest = " " * len(first) if rest is None else rest
    if columns is None:
        return [first + text]
    return textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or [
        first.rstrip()
    ]


def paragraph(text: str, columns: int | None, style: str = "", rest: str = "") -> Iterator[Line]:
    """A paragraph; line breaks of the source stay where there is no width to fill."""
    for line in text.splitlines() if columns is None else wrapped(" ".join(text.split()), columns, rest=rest):
        yield [(line, style)]


def docstring(text: str, columns: int | None) -> Iterator[Line]:
    """A docstring's paragraphs. Code stays as it is; the entries of a section such as ``Args:`` begin lines of their own."""
    for number, part in enumerate(re.sub(r"(?m)^::\n\n", "", text).split("\n\n")):
        yield from [[]] if number else []
        if columns is None or part.startswith(" "):  # code; a section's first line is not indented
            yield from ([(line, "")] for line in part.splitlines())
            continue
        for entry in re.split(r"\n(?= {0,4}\S)", part) if "\n    " in part else [part]:
            indent = " " * (len(entry) - len(entry.lstrip()))
            yield from ([(line, "")] for line in wrapped(" ".join(entry.split()), columns, indent, indent and indent + "    "))


def pairs(rows: Iterable[tuple[str, str]], columns: int | None) -> Iterator[Line]:
    """Keys and values, aligned; rows without a value are left out."""
    for key, value in rows:
        if value:
            head, *more = wrapped(value, columns, f"{key:<13} ")
            yield [(head[:14], "bold"), (head[14:], "")]
            yield from ([(line, "")] for line in more)


def table(rows: Iterable[Sequence[str]], columns: int | None, indent: str = "  ") -> Iterator[Line]:
    """Rows of three cells, aligned. Where ``columns`` are too few, the last cell is wrapped, or has lines of its own."""
    lines = [tuple(row) for row in rows]
    if not lines:
        return
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    longest = max(len(line[2]) for line in lines)
    beside = len(indent) + sum(widths) + 4
    fits = columns is None or beside + min(longest, LEAST) <= columns
    for first, second, third in lines:
        if fits:
            place = f"{indent}{first:<{widths[0]}}  {second:<{widths[1]}}  "
            head, *more = wrapped(third, columns, place)
            yield [(head[: len(indent) + widths[0]], "cyan"), (head[len(indent) + widths[0] :].rstrip(), "")]
        else:
            head, *more = wrapped(second, columns, f"{indent}{first:<{min(widths[0], LEAST)}}  ", indent + " " * 6)
            yield [(head[: len(indent) + len(first)], "cyan"), (head[len(indent) + len(first) :].rstrip(), "")]
            more += wrapped(third, columns, indent + " " * 4) if third else []
        yield from ([(line, "")] for line in more)
