"""The pytest plugin: ``--hbcore-optimizer NAME`` and the fixture ``hbcore_conformance``. Imports torch only when used."""

from __future__ import annotations

from collections.abc import Callable

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; the first may be repeated."""
    group = parser.getgroup("hbcore")
    group.addoption(
        "--hbcore-optimizer",
        action="append",
        default=[],
        metavar="NAME",
        help="run hbcore's conformance checks on this optimizer, in tests that use the fixture hbcore_conformance "
        "(pytest --pyargs hbcore.testing.suite has one)",
    )
    group.addoption(
        "--hbcore-ranks",
        type=int,
        metavar="N",
        help="also run the conformance checks of several processes, on N of them under FSDP2",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create one test for each optimizer of ``--hbcore-optimizer`` and each check that applies to it."""
    if "hbcore_conformance" not in metafunc.fixturenames:
        return
    cases = []
    for name in metafunc.config.getoption("--hbcore-optimizer"):
        from hbcore.testing import CHECKS, RANK_CHECKS, subjects

        every = (*CHECKS, *RANK_CHECKS) if metafunc.config.getoption("--hbcore-ranks") else CHECKS
        for subject in subjects(name):
            applicable = [c for c in every if c.applies(subject.capabilities) and (c.stored or not subject.options)]
            cases += [pytest.param((check, subject), id=f"{subject}-{check.name}") for check in applicable]
    metafunc.parametrize("hbcore_conformance", cases, indirect=True)


@pytest.fixture
def hbcore_conformance(request: pytest.FixtureRequest) -> Callable[[], None]:
    """A function that runs one check on one optimizer."""
    check, subject = request.param

    def run() -> None:
        from hbcore.testing import RANK_CHECKS
        from hbcore.testing.ranks import Pool

        if check not in RANK_CHECKS:
            check.run(subject)
            return
        with Pool() as pool:
            check.run(subject, pool, request.config.getoption("--hbcore-ranks"))

    return run
