"""The kit on several processes: it passes what is right, finds what is at fault on shards only, and waits for nobody."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from testing.broken import broken
from testing.broken_ranks import BROKEN, CORRECT

from hbcore.testing import CHECKS, RANK_CHECKS, Subject, assert_conforms, check, subjects
from hbcore.testing.ranks import Pool

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

NAMES = [c.name for c in RANK_CHECKS]


@pytest.fixture(scope="module")
def pool():
    with Pool() as pool:
        yield pool


def test_every_check_of_ranks_has_a_broken_optimizer():
    assert set(NAMES) == set(BROKEN)
    assert not {c.name for c in CHECKS} & set(NAMES)


@pytest.mark.parametrize(
    ("check", "cls"), [(c, cls) for c in RANK_CHECKS for cls in BROKEN[c.name]], ids=lambda x: getattr(x, "__name__", None)
)
def test_a_broken_optimizer_is_found(check, cls, pool):
    with pytest.raises(AssertionError, match="expected"):
        check.function(Subject(cls), pool, 2)


@pytest.mark.parametrize("cls", CORRECT, ids=lambda cls: cls.__name__)
def test_a_correct_one_passes_plain_and_compressed_and_so_does_one_that_refuses(cls, pool):
    for subject in subjects(cls):
        for each in RANK_CHECKS:
            each.function(subject, pool, 2)


BROAD = [pytest.param(name, marks=pytest.mark.broad) for name in ("SOAP", "PSGDKron", "MSAMLaProp")]


@pytest.mark.parametrize("name", ["Muon", "SFAdamW", *BROAD])
@pytest.mark.parametrize("check", RANK_CHECKS, ids=NAMES)
def test_optimizers_of_each_kind_pass(name, check, pool):
    for subject in subjects(name):
        check.function(subject, pool, 2)


@pytest.mark.broad  # eight seconds of processes
def test_it_is_asked_for_by_its_argument(monkeypatch):
    assert check("SGD", only=NAMES, ranks=2) == []
    found = check(BROKEN[NAMES[0]][0], only=NAMES[:1], ranks=2)
    assert [f.check for f in found] == NAMES[:1] * 2
    with pytest.raises(ValueError, match="no check is named"):
        check("SGD", only=NAMES)
    with pytest.raises(ValueError, match="ranks=0 is no number of processes"):
        check("SGD", ranks=0)
    asked = []
    monkeypatch.setattr("hbcore.testing.results.run", lambda cases, *how: asked.extend(cases) or [])
    assert_conforms("SGD", ranks=2)
    assert {case.check.name for case in asked if case.ranks == 2} == set(NAMES)


def test_a_class_that_no_other_process_can_import_is_told_so(pool):
    with pytest.raises(AssertionError, match="define its class in a module"):
        RANK_CHECKS[0].function(Subject(broken()), pool, 2)


@pytest.mark.broad  # eight seconds of processes
def test_the_option_of_pytest_runs_them():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--co", "--pyargs"]
    command += ["hbcore.testing.suite", "--hbcore-optimizer", "SGD"]
    listed = [
        subprocess.run([*command, *more], capture_output=True, text=True, env=os.environ).stdout
        for more in ((), ("--hbcore-ranks", "2"))
    ]
    assert NAMES[0] not in listed[0]
    assert f"SGD()-{NAMES[0]}" in listed[1] and f"SGD(ecc='bf16+8')-{NAMES[1]}" in listed[1]


def test_compressed_state_is_checked_for_what_a_codec_can_be_at_fault_for(monkeypatch):
    ran = []
    monkeypatch.setattr(
        "hbcore.testing.results.run", lambda cases, *how: ran.extend((c.check.name, str(c.subject)) for c in cases) or []
    )
    check("SGD")
    assert ("every_hook_runs_once", "SGD()") in ran and ("every_hook_runs_once", "SGD(ecc='bf16+8')") not in ran
    assert ("resuming_changes_no_bit", "SGD(ecc='bf16+8')") in ran
    ran.clear()
    check("SGD", ecc=["bf16+8"])
    assert ("every_hook_runs_once", "SGD(ecc='bf16+8')") in ran
