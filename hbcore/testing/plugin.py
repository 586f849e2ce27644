"""The pytest plugin: ``--hbcore-optimizer NAME`` and the fixture ``hbcore_conformance``. Imports torch only when used."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option, which may be repeated."""
    parser.getgroup("hbcore").addoption(
        "--hbcore-optimizer",
        action="append",
        default=[],
        metavar="NAME",
        help="run hbcore's conformance checks on this optimizer, in tests that use the fixture hbcore_conformance "
        "(pytest --pyargs hbcore.testing.suite has one)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create one test for each optimizer of ``--hbcore-optimizer`` and each check that applies to it."""
    if "hbcore_conformance" not in metafunc.fixturenames:
        return
    cases = []
    for name in metafunc.config.getoption("--hbcore-optimizer"):
        from hbcore.testing import CHECKS, subjects

        for subject in subjects(name):
            applicable = [check for check in CHECKS if check.applies(subject.capabilities)]
            cases += [pytest.param((check, subject), id=f"{subject}-{check.name}") for check in applicable]
    metafunc.parametrize("hbcore_conformance", cases, indirect=True)


@pytest.fixture
def hbcore_conformance(request: pytest.FixtureRequest) -> Callable[[], None]:
    """A function that runs one check on one optimizer."""
    check, subject = request.param
    return lambda: check.function(subject)
