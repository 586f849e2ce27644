"""Every conformance check finds the fault that it is there for, and says what is wrong."""

from __future__ import annotations

import gc

import pytest
from testing.broken import BROKEN, KEPT

from hbcore.testing import CHECKS, Subject

CASES = [
    pytest.param(check, each, id=f"{check.name}-{i}")
    for check in CHECKS
    for found in [BROKEN.get(check.name, ())]
    for i, each in enumerate(found if isinstance(found, tuple) else (found,))
]


@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    KEPT.clear()
    gc.collect()


def test_every_check_has_a_broken_optimizer():
    assert {check.name for check in CHECKS} == set(BROKEN)


@pytest.mark.parametrize(("check", "broken"), CASES)
def test_a_broken_optimizer_is_found(check, broken):
    subject = broken if isinstance(broken, Subject) else Subject(broken)
    assert check.applies(subject.capabilities)
    with pytest.raises(AssertionError, match=r"expected|became|drew|replaced|changed|alive"):
        check.function(subject)
