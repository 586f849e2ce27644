"""Words on the command line -> which optimizers to build, and with what."""

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
    """The Python value that ``text`` stands for.

    A literal is itself (``0.1``, ``None``, ``(1, 2)``), a comma list is a tuple (``0.9,0.95``), ``true``, ``false`` and
    ``none`` mean what they say in any case (as a string, ``false`` would be true), and any other word is a string.
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


def _split_label(word: str) -> tuple[str, str]:
    """``fast=AdamW`` -> ``("fast", "AdamW")``; without a label, the name is the label."""
    label, equals, name = word.partition("=")
    if equals and not (label and name):
        raise OptionError(f"expected NAME or LABEL=NAME, got {word!r}")
    return (label, name) if equals else (word, word)


def _split_assignment(word: str) -> tuple[str | None, str, Any]:
    """``AdamW:lr=0.1`` -> ``("AdamW", "lr", 0.1)``; the label is None where there is none."""
    target, equals, text = word.partition("=")
    # A label may hold a colon itself ("hb_psgd:PSGDKron"); a keyword never does.
    label, _, key = target.rpartition(":")
    if not equals or not key.isidentifier():
        hint = "" if equals else "; optimizers come before --optimizer-args"
        raise OptionError(f"--optimizer-args: expected KEY=VALUE or LABEL:KEY=VALUE, got {word!r}{hint}")
    return label or None, key, parse_value(text)


def parse_entries(optimizers: Sequence[str], assignments: Iterable[str]) -> list[Entry]:
    """The runs to make, in the order given.

    Args:
        optimizers: ``NAME`` or ``LABEL=NAME``.
        assignments: ``KEY=VALUE`` for every run, ``LABEL:KEY=VALUE`` for one. What is said of one label wins over what
            is said of all, whichever comes first.

    Raises:
        OptionError: a malformed word, a label used twice, or an assignment to a label that is not there.
    """
    names: dict[str, str] = {}
    for label, name in map(_split_label, optimizers):
        if label in names:
            raise OptionError(f"label {label!r} is used twice; tell the runs apart: first={name} second={name}")
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
