"""The checks as tests: ``pytest --pyargs hbcore.testing.suite --hbcore-optimizer NAME``."""

from __future__ import annotations

from collections.abc import Callable


def test_conformance(hbcore_conformance: Callable[[], None]) -> None:
    """Run one check on one optimizer."""
    hbcore_conformance()
