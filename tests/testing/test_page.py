"""docs/testing.md has the checks that there are, and its examples and options exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from hbcore.testing import Result, conformance, levels
from hbcore.testing.results import Status

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("list_checks", ROOT / "scripts" / "list_checks.py")
listing = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(listing)


def test_the_tables_are_current():
    assert listing.PAGE.read_text() == listing.page(), "run `python scripts/list_checks.py`, and commit what it writes."


def test_every_check_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \| (api-\d+) \|", listing.PAGE.read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == levels.names_of(None)
    assert {level for _, level in rows} == set(levels.ADDED)


def test_arguments_statuses_and_options_are_those_of_the_code():
    text = listing.PAGE.read_text()
    arguments = set(conformance.__kwdefaults__)
    assert arguments == {name for name in arguments if f"`{name}=" in text}
    assert all(f"| `{status}` |" in text for status in Status.__args__)
    assert all(f"`{field}`" in text for field in Result.__dataclass_fields__)
    plugin = (ROOT / "hbcore" / "testing" / "plugin.py").read_text()
    assert set(re.findall(r"--hbcore-\w+", text)) == set(re.findall(r'"(--hbcore-\w+)"', plugin))
