"""Running the kit: from Python, and through pytest's option."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch
from testing.broken import BROKEN, broken

import hbcore
from hb_adam import SGD, AdamW
from hb_soap import SOAP
from hbcore.registry.spec import CAPABILITIES, OptimizerSpec
from hbcore.testing import CHECKS, Result, Subject, assert_conforms, check, subjects


class NeedsClosure(SGD):
    """SGD that evaluates the model anew, as sharpness-aware minimisation does."""

    def step(self, closure=None):
        if closure is None and any(g["lr"] for g in self.param_groups):  # a dry step, of lr 0, moves nothing
            raise ValueError("pass a closure")
        return SGD.step(self, closure)

    step.hooked = True  # as the step it calls


def test_checks_have_names_of_their_own_and_say_what_users_lose():
    assert len({c.name for c in CHECKS}) == len(CHECKS)
    for c in CHECKS:
        assert (inspect.getdoc(c.function) or "").startswith("If this fails, ")
        assert c.needs | c.excludes <= CAPABILITIES


def test_an_optimizer_is_tested_plain_and_compressed_with_its_capabilities():
    assert subjects("sgd") == [Subject(SGD, frozenset({"capturable"}), o) for o in ({}, {"ecc": "bf16+8"})]
    assert subjects(SOAP)[0].capabilities == {"matrix", "primes"}
    assert subjects(broken())[0].capabilities == hbcore.info("AdamW").spec.capabilities
    assert subjects(type("Alone", (torch.optim.Optimizer,), {}))[0].capabilities == frozenset()
    assert str(subjects(SGD)[1]) == "SGD(ecc='bf16+8')"
    assert [s.options for s in subjects(SGD, ecc=["bf16+16", "mine"])] == [{}, {"ecc": "bf16+16"}, {"ecc": "mine"}]


def test_findings_name_check_optimizer_and_fault():
    name = "a_closure_is_called_and_its_loss_returned"
    assert check("AdamW", only=[name, "the_seed_option_is_used"]) == []
    plain, compressed = check(BROKEN[name], only=[name])
    assert (plain.check, plain.subject, compressed.subject) == (name, "Broken()", "Broken(ecc='bf16+8')")
    assert "found None" in plain.message and name in str(plain) and "found None" in str(plain)
    with pytest.raises(ValueError, match="no check is named 'speed'"):
        check("AdamW", only=["speed"])


def test_what_raises_is_a_finding_and_the_list_of_them_an_assertion(monkeypatch):
    class Raises(AdamW):
        def load_state_dict(self, state_dict):
            raise RuntimeError("no room")

    [found, _] = check(Raises, only=["every_hook_runs_once"])
    assert "RuntimeError: no room" in found.message
    monkeypatch.setattr("hbcore.testing.runner.run_checks", lambda *a, **how: [Result("c", "S()", "failed", "m")])
    with pytest.raises(AssertionError, match=r"1 checks failed:\nS\(\) fails c: m"):
        assert_conforms("AdamW")


def test_an_optimizer_that_needs_a_closure_gets_one_from_every_check():
    subject = Subject(NeedsClosure, frozenset({"closure"}))
    chosen = [c for c in CHECKS if c.applies(subject.capabilities)]
    assert len(chosen) > 30
    for c in chosen:
        c.function(subject)


def test_an_unknown_capability_is_refused():
    with pytest.raises(hbcore.RegistryError, match=r"declares unknown capabilities: 'fast'; choose from capturable"):
        OptimizerSpec("A", "m:C", "", capabilities=frozenset({"fast", "matrix"}))


def pytest_run(folder, *arguments):
    # The plugin by its module: its entry point may be installed or not, and twice is an error.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "hbcore.testing.plugin", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.broad  # pytest in a process
def test_the_option_runs_the_checks_over_one_optimizer(tmp_path):
    done = pytest_run(tmp_path, "--pyargs", "hbcore.testing.suite", "--hbcore-optimizer", "SGD", "-k", "saving or hook", "-vv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SGD(ecc='bf16+8')-saving_early_leaves_no_trace" in done.stdout and "3 passed" in done.stdout


@pytest.mark.broad  # pytest in a process
def test_the_fixture_serves_an_authors_own_test_and_without_the_option_there_is_nothing_to_run(tmp_path):
    (tmp_path / "test_mine.py").write_text("def test_mine(hbcore_conformance):\n    hbcore_conformance()\n")
    assert "1 skipped" in pytest_run(tmp_path).stdout
    done = pytest_run(tmp_path, "--hbcore-optimizer", "SOAP", "-k", "primes")
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_plugin_costs_runs_that_do_not_use_it_no_torch():
    command = "import sys, hbcore.testing.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
