"""Docstrings as Markdown: formulas, names of code, and the sections that they are divided into."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

GENERAL = "Arguments of every optimizer:"
"""Where the part begins that every optimizer's docstring has."""

_SECTION = re.compile(r"(Args|State|Warns|Raises|Returns):(?:\s|$)")


class Described(NamedTuple):
    """A docstring's parts, as Markdown.

    Attributes:
        text: the paragraphs and formulas before the first section.
        arguments: argument -> its meaning, in the order of the docstring.
        sections: the title of another section, "State" or "Warns" -> its text.
    """

    text: str
    arguments: dict[str, str]
    sections: dict[str, str]


def describe(cls: type[object], pages: Collection[str]) -> Described:
    """The class's docstring; names in ``pages`` become links to their pages."""
    return parse(inspect.getdoc(cls) or "", pages)


def parse(doc: str, pages: Collection[str]) -> Described:
    """As :func:`describe`, of a dedented docstring."""
    paragraphs = doc.split(GENERAL)[0].strip().split("\n\n")
    text: list[str] = []
    arguments: dict[str, str] = {}
    sections: dict[str, str] = {}
    for paragraph in paragraphs:
        opening = _SECTION.match(paragraph)
        if opening is None:
            text.append(_paragraph(paragraph, pages))
        elif opening[1] == "Args":
            arguments = {name: inline(meaning, pages) for name, meaning in _entries(paragraph)}
        else:
            sections[opening[1]] = inline(" ".join(paragraph[opening.end() :].split()), pages)
    return Described("\n\n".join(text), arguments, sections)


def _entries(section: str) -> list[tuple[str, str]]:
    """The names and meanings of an "Args" section: one a name, though several may share a meaning."""
    body = inspect.cleandoc("\n" + section.partition("\n")[2])
    entries: list[tuple[str, str]] = []
    for entry in re.split(r"\n(?! )", body):
        names, _, meaning = " ".join(entry.split()).partition(": ")
        entries += [(name.strip(), meaning) for name in names.split(",")]
    return entries


def _paragraph(paragraph: str, pages: Collection[str]) -> str:
    if paragraph.startswith(".. math::"):
        return "\n\n".join(f"\\[\n{line}\n\\]" for line in formulas(paragraph.removeprefix(".. math::")))
    return inline(" ".join(paragraph.split()), pages)


def formulas(source: str) -> list[str]:
    r"""The formulas of a block, one a line: what ``\\`` and ``\qquad`` set apart outside braces and brackets that grow."""
    parts, depth, start = [], 0, 0
    source = " ".join(source.split())
    for token in re.finditer(r"\\left\b|\\right\b|\\qquad\b|\\\\|\\[{}]|[{}]", source):
        depth += {"\\left": 1, "{": 1, "\\right": -1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] in ("\\qquad", "\\\\"):
            parts.append(source[start : token.start()])
            start = token.end()
    parts.append(source[start:])
    lines: list[str] = []
    for part in filter(None, (part.strip() for part in parts)):
        if lines and re.match(r"[-+]|\\left", part):  # a formula that goes on in the next line
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return lines


def inline(text: str, pages: Collection[str]) -> str:
    """A paragraph: reStructuredText's roles and literals, arXiv numbers and addresses as Markdown."""
    kept: list[str] = []

    def keep(markdown: str) -> str:
        kept.append(markdown)
        return f"\0{len(kept) - 1}\0"

    replacements: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r":math:`([^`]*)`", lambda m: keep(f"\\({m[1]}\\)")),
        (r":\w+:`~?([^`]*)`", lambda m: keep(_name(m[1], pages))),
        (r"``([^`]*)``", lambda m: keep(f"`{m[1]}`")),
        (r"`([^`]*)`", lambda m: keep(f"`{m[1]}`")),
        (r"arXiv:(\d{4}\.\d{4,5})", lambda m: keep(f"[arXiv:{m[1]}](https://arxiv.org/abs/{m[1]})")),
        (r"https?://[^\s;,)]+(?<![.:])", lambda m: keep(f"[{m[0].split('://')[1].rstrip('/')}]({m[0]})")),
    ]
    for pattern, replacement in replacements:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"([_<|])", r"\\\1", text)
    return re.sub("\0(\\d+)\0", lambda m: kept[int(m[1])].replace("|", "\\|"), text)


def _name(target: str, pages: Collection[str]) -> str:
    short = target.rpartition(".")[2]
    return f"[{short}]({short}.md)" if short in pages else f"`{target}`"
