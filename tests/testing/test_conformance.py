"""Every registered optimizer passes every check that applies to it, with plain and with compressed state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hbcore
from hbcore.testing import CHECKS, Check, Subject

VARIANTS = {"plain": {}, "ecc": {"ecc": "bf16+8"}, "cpp": {"compile": "cpp"}}
COMPRESSED = {"AdamW", "AdEMAMix", "MSAMLaProp", "Muon", "PSGDKron", "SFAdamW", "SOAP"}
"""These, one of each kind of rule, conform in ``make test``, with compressed state in what a codec can be at fault for. In CI
they do so in everything, and all others with plain state; ``make test-full`` tries these with compressed state too, and all of
them on the C++ backend."""
COMPILED = {"AdamW": "ecc", "MSAMLaProp": "plain", "OrthoLaProp": "plain", "SOAP": "ecc"}
"""For these, with this state, ``make test`` compiles: one phase, two with a sum over the model, three, and segments around a
matrix rule. It runs the graphs of all others as they are, and ``make test-full`` compiles them too."""


def subject_of(name: str, variant: str) -> Subject:
    return Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, VARIANTS[variant])


def cases() -> Iterator[Any]:
    for name in hbcore.list_optimizers():
        for variant in VARIANTS:
            for check in CHECKS:
                if not check.applies(hbcore.info(name).spec.capabilities) or (variant == "cpp" and check.compiles):
                    continue
                seldom = check.compiles and COMPILED.get(name) != variant
                marks = _marks(name, variant, check)
                yield pytest.param(check, name, variant, not seldom, id=f"{name}-{variant}-{check.name}", marks=marks)
                if seldom:
                    marks = pytest.mark.full
                    yield pytest.param(check, name, variant, True, id=f"{name}-{variant}-{check.name}-compiled", marks=marks)


def _marks(name: str, variant: str, check: Check) -> Any:
    """Which of the runs try this: see :data:`COMPRESSED`."""
    if variant == "cpp":
        return pytest.mark.full
    if variant == "plain":
        return () if name in COMPRESSED else pytest.mark.broad
    return pytest.mark.full if name not in COMPRESSED else () if check.stored else pytest.mark.broad


@pytest.mark.parametrize(("check", "name", "variant", "compiles"), list(cases()))
def test_every_optimizer_conforms(check: Check, name: str, variant: str, compiles: bool) -> None:
    check.run(subject_of(name, variant), compiled=compiles)


def test_as_many_phases_as_a_segment_of_any_optimizer_has_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer of a new shape belongs to :data:`COMPILED`."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    phases = {}
    for name in hbcore.list_optimizers():
        trial = subject_of(name, "plain").loose((6, 4), (5,), compile="inductor")
        trial.train(2)
        report = trial.optimizer.report
        phases[name] = 1 + report.compiles - report.programs  # if one segment alone has more than one
    assert set(phases.values()) == {phases[name] for name in COMPILED}
