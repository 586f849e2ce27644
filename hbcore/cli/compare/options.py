"""Parses the command line into optimizers and their arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hbcore.errors import OptionError

_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Entry:
    """One run to make: ``label`` on the charts, ``name`` in the registry, ``kwargs`` for the constructor."""

    label: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def parse_value(text: str) -> Any:
    """Parse ``text`` into a Python value.

    Python literals (``0.1``, ``None``, ``(1, 2)``) are evaluated, and a comma-separated list (``0.9,0.95``) is a tuple.
    ``true``, ``false`` and ``none`` are recognised in any case, since the string ``"false"`` would be true. Anything else is a
    string.
    """
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        if "," in text and not set(text) & set("()[]{}'\""):
            return tuple(parse_value(part) for part in text.split(",") if part.strip())
        return text


def format_value(value: Any) -> str:
    """The text that :func:`parse_value` reads as ``value``: a number, a string, a boolean, None, or a tuple of them."""
    if isinstance(value, tuple) and len(value) > 1:
        return ",".join(map(repr, value))
    return value if isinstance(value, str) and value and parse_value(value) == value else repr(value)


def _split_label(word: str) -> tuple[str, str]:
    """``fast=AdamW`` -> ``("fast", "AdamW")``; the label defaults to the name."""
    label, equals, name = word.partition("=")
    if equals and not (label and name):
        raise OptionError(f"expected NAME or LABEL=NAME, got {word!r}")
    return (label, name) if equals else (word, word)


def _split_assignment(word: str) -> tuple[str | None, str, Any]:
    """``AdamW:lr=0.1`` -> ``("AdamW", "lr", 0.1)``; without a label, ``(None, "lr", 0.1)``."""
    target, equals, text = word.partition("=")
    # A label may contain a colon ("hb_psgd:PSGDKron"); a keyword never does.
    label, _, key = target.rpartition(":")
    if not equals or not key.isidentifier():
        hint = "" if equals else "; optimizers come before --optimizer-args"
        raise OptionError(f"--optimizer-args: expected KEY=VALUE or LABEL:KEY=VALUE, got {word!r}{hint}")
    return label or None, key, parse_value(text)


def parse_entries(optimizers: Sequence[str], assignments: Iterable[str]) -> list[Entry]:
    """The runs to make, in the order given.

    Args:
        optimizers: ``NAME`` or ``LABEL=NAME``.
        assignments: ``KEY=VALUE`` for every run, ``LABEL:KEY=VALUE`` for one. Assignments to a label take precedence,
            whatever the order.

    Raises:
        OptionError: a word is malformed, a label is used twice, or an assignment names an unknown label.
    """
    names: dict[str, str] = {}
    for label, name in map(_split_label, optimizers):
        if label in names:
            raise OptionError(f"label {label!r} is used twice; distinguish the runs: first={name} second={name}")
        names[label] = name
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {label: {} for label in names}
    for label_or_none, key, value in map(_split_assignment, assignments):
        if label_or_none is None:
            shared[key] = value
        elif label_or_none in own:
            own[label_or_none][key] = value
        else:
            known = ", ".join(names)
            raise OptionError(f"--optimizer-args: no run is labelled {label_or_none!r}; the labels are {known}")
    return [Entry(label, name, {**shared, **own[label]}) for label, name in names.items()]
