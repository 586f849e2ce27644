"""The tables of ``docs/options.md``: ``<!-- options: NAME, NAME -->`` becomes the defaults and meanings of those options."""

from __future__ import annotations

import re

from docs_site import prose
from docs_site.optimizer_page import shown, table
from hbcore.engine.shared_options import OPTIONS, SCHEDULED

_DIRECTIVE = re.compile(r"^<!-- options: (.*?) -->$", flags=re.MULTILINE)


def fill(markdown: str) -> str:
    """The page with its tables.

    Raises:
        ValueError: an option does not exist, or is in no table or in two.
    """
    named = [name.strip() for names in _DIRECTIVE.findall(markdown) for name in names.split(",")]
    if named and sorted(named) != sorted(OPTIONS):
        wrong = sorted(set(named) ^ set(OPTIONS)) or sorted(name for name in set(named) if named.count(name) > 1)
        raise ValueError(f"each shared option belongs into exactly one table of the page; look at {', '.join(wrong)}")
    return _DIRECTIVE.sub(lambda match: _table([name.strip() for name in match[1].split(",")]), markdown)


def _table(names: list[str]) -> str:
    rows = [
        (f"`{name}`", shown(OPTIONS[name].default), "yes" if name in SCHEDULED else "", prose.inline(OPTIONS[name].doc, ()))
        for name in names
    ]
    return table(("option", "default", "scheduled", "meaning"), rows)
