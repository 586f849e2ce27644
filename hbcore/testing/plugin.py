"""The pytest plugin: ``--hbcore-plugin NAME``, ``--hbcore-optimizer NAME`` and the fixture ``hbcore_conformance``.

pytest loads it in every run, so it imports torch only when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hbcore.testing.selection import Selection

SUITE = Path(__file__).with_name("suite.py")
OPTIONS = ("plugin", "optimizer", "level", "ranks")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options; the first two may be repeated."""
    group = parser.getgroup("hbcore")
    group.addoption(
        "--hbcore-plugin",
        action="append",
        default=[],
        metavar="NAME",
        help="run hbcore's conformance checks on every optimizer and codec that this plugin declares; if no paths are given, "
        "run nothing else",
    )
    group.addoption(
        "--hbcore-optimizer",
        action="append",
        default=[],
        metavar="NAME",
        help="run hbcore's conformance checks on this optimizer, in tests that use the fixture hbcore_conformance "
        "(pytest --pyargs hbcore.testing.suite has one)",
    )
    group.addoption(
        "--hbcore-level", metavar="LEVEL", help="run exactly the checks of this level, such as api-1; by default, the newest"
    )
    group.addoption(
        "--hbcore-ranks",
        type=int,
        metavar="N",
        help="also run the conformance checks of several processes, on N of them under FSDP2",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse names that are unknown, and collect the suite for ``--hbcore-plugin``: in place of a folder that nobody named."""
    if not any(config.getoption(f"--hbcore-{option}") for option in OPTIONS) and config.getoption("--hbcore-ranks") is None:
        return
    from hbcore.errors import RegistryError

    selection = _selection(config)
    try:
        selection.validate()
    except (RegistryError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    if selection.plugins:
        named = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
        wanted = any(Path(arg).name in (SUITE.name, "hbcore.testing.suite") for arg in named)
        config.args[:] = [*named, *([] if wanted else [str(SUITE)])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Create one test for each check that applies to what the options name."""
    if "hbcore_conformance" not in metafunc.fixturenames:
        return
    selection = _selection(metafunc.config)
    found = selection.cases() if selection.plugins or selection.optimizers else []
    metafunc.parametrize("hbcore_conformance", [pytest.param(case, id=str(case)) for case in found], indirect=True)


@pytest.fixture
def hbcore_conformance(request: pytest.FixtureRequest) -> Callable[[], None]:
    """A function that runs one check on one optimizer or codec."""
    case: Callable[[], None] = request.param
    return case


def _selection(config: pytest.Config) -> Selection:
    from hbcore.testing.selection import Selection

    plugins, optimizers, level, ranks = (config.getoption(f"--hbcore-{option}") for option in OPTIONS)
    return Selection(tuple(plugins), tuple(optimizers), level, ranks)
