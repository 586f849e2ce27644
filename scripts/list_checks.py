"""Write the tables of docs/testing.md: what each check of the conformance kit holds.

    python scripts/list_checks.py

Between the page's two comments everything is written anew, from the checks' names, docstrings and levels.
``tests/testing/test_page.py`` says when that is due.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hbcore.testing import CHECKS, CODEC_CHECKS, RANK_CHECKS, Check, levels

PAGE = Path(__file__).parent.parent / "docs" / "testing.md"
START, END = "<!-- written by scripts/list_checks.py -->\n", "<!-- until here -->\n"


def page() -> str:
    """The page with today's tables."""
    before, _, rest = PAGE.read_text().partition(START)
    return f"{before}{START}\n{tables()}\n{END}{rest.partition(END)[2]}"


def tables() -> str:
    """One table for each kind of check, in Markdown."""
    kinds: dict[str, Iterable[Check]] = {
        "Optimizers": CHECKS,
        "Several processes": RANK_CHECKS,
        "Codecs": [Check(function) for function in CODEC_CHECKS],
    }
    head = "| check | level | applies to | if it fails |\n|---|---|---|---|\n"
    return "\n".join(f"### {kind}\n\n{head}{''.join(map(_row, checks))}" for kind, checks in kinds.items())


def _row(check: Check) -> str:
    level = next(name for name, added in levels.ADDED.items() if check.name in added)
    return f"| `{check.name}` | {level} | {_applies(check)} | {_loss(check.function)} |\n"


def _applies(check: Check) -> str:
    parts = [", ".join(sorted(check.needs))] if check.needs else []
    if check.excludes:
        parts.append(f"not {', '.join(sorted(check.excludes))}")
    if check.stored:
        parts.append("compressed state too")
    return "; ".join(parts) or "all"


def _loss(function: Callable[..., Any]) -> str:
    """What the docstring says that users lose, on one line."""
    text = " ".join((inspect.getdoc(function) or "").split()).removeprefix("If this fails, ")
    return text.replace("|", "\\|").replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page())
