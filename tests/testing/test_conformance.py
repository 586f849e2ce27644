"""Every registered optimizer passes every check that applies to it, with plain and with compressed state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hbcore
from hbcore.testing import CHECKS, Case, Subject, conformance

NAMES = hbcore.list_optimizers()
CODEC = "bf16+8"
COMPRESSED = {"AdamW", "AdEMAMix", "MSAMLaProp", "Muon", "PSGDKron", "SFAdamW", "SOAP"}
"""These, one of each kind of rule, conform in ``make test``, with compressed state in what a codec can be at fault for. In CI
they do so in everything, and all others with plain state; ``make test-full`` tries these with compressed state too, and all of
them on the C++ backend."""
COMPILED = {"AdamW": "ecc", "MSAMLaProp": "plain", "OrthoLaProp": "plain", "SOAP": "ecc"}
"""For these, with this state, ``make test`` compiles: one phase, two with a sum over the model, three, and segments around a
matrix rule. It runs the graphs of all others as they are, and ``make test-full`` compiles them too."""


def subject_of(name: str, **options: Any) -> Subject:
    return Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, options)


def variant(case: Case) -> tuple[str, str]:
    return case.subject.cls.__name__, "ecc" if case.subject.options else "plain"


def seldom(case: Case) -> Any:
    """Which of the runs try this: see :data:`COMPRESSED`."""
    name, state = variant(case)
    if state == "plain":
        return () if name in COMPRESSED else pytest.mark.broad
    return pytest.mark.full if name not in COMPRESSED else () if case.check.stored else pytest.mark.broad


def seldom_compiled(case: Case) -> Any:
    """Which of the runs compile this: see :data:`COMPILED`."""
    name, state = variant(case)
    return () if COMPILED.get(name) == state else pytest.mark.full


@conformance(*NAMES, ecc=[CODEC], marks=seldom)
def test_every_optimizer_conforms(check: Case) -> None:
    check()


@conformance(*NAMES, only=[c.name for c in CHECKS if c.compiles], ecc=[CODEC], compiled=True, marks=seldom_compiled)
def test_every_optimizer_conforms_when_compiled(check: Case) -> None:
    check()


def on_cpp() -> list[Any]:
    subjects = [subject_of(name, compile="cpp") for name in NAMES]
    cases = [Case(c, s) for s in subjects for c in CHECKS if c.applies(s.capabilities) and not c.compiles]
    return [pytest.param(case, id=str(case)) for case in cases]


@pytest.mark.full
@pytest.mark.parametrize("check", on_cpp())
def test_every_optimizer_conforms_on_the_cpp_backend(check: Case) -> None:
    check()


def test_as_many_phases_as_a_segment_of_any_optimizer_has_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer of a new shape belongs to :data:`COMPILED`."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    phases = {}
    for name in hbcore.list_optimizers():
        trial = subject_of(name).loose((6, 4), (5,), compile="inductor")
        trial.train(2)
        report = trial.optimizer.report
        phases[name] = 1 + report.compiles - report.programs  # if one segment alone has more than one
    assert set(phases.values()) == {phases[name] for name in COMPILED}
