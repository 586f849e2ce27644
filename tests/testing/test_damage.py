"""Damaged state dicts of every optimizer are refused as a whole or loaded as a whole; hypothesis looks for one that is not."""

from __future__ import annotations

import copy
import functools
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from testing.broken import BROKEN

import hbcore
from hb_adam import AdamW
from hbcore.testing import Subject
from hbcore.testing.checks_damage import Patient, bits, losses
from hbcore.testing.damage import KINDS, damaged


class Split(hbcore.SplitOpt):
    """Muon for matrices and schedule-free AdamW for the rest."""

    def __init__(self, params, **options):
        specs = [{"optimizer": "Muon", "when": lambda p: p.ndim == 2}, {"optimizer": "SFAdamW"}]
        super().__init__(params, specs, lr=0.01, **options)


NAMES = [*hbcore.list_optimizers(), "SplitOpt"]
VARIANTS = {
    "plain": {},
    "bf16+8": {"ecc": "bf16+8"},
    "int8": {"ecc": "int8"},
    "weights": {"param_ecc": "bf16+8"},
    "average": {"use_ema": True},
    "mars": {"mars": True},
}


@functools.cache
def patient(name: str, variant: str) -> Patient:
    """An optimizer with an option, or without those that it has not."""
    if name == "SplitOpt":
        return Patient(Subject(Split))
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, VARIANTS[variant])
    try:
        subject.loose((2, 2))
    except hbcore.HbcoreError:
        return patient(name, "plain")
    return Patient(subject)


def property_of(examples: int):
    """The property, tried with so many examples: the same in each run."""
    shrinks = (Phase.explicit, Phase.generate, Phase.shrink)
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=shrinks,
        suppress_health_check=checks,
        report_multiple_bugs=False,
    )
    @given(st.sampled_from(NAMES), st.sampled_from(list(VARIANTS)), st.randoms(use_true_random=False))
    def holds(name, variant, random):
        patient(name, variant).survives(random)

    return holds


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_state_is_refused_as_a_whole_or_loaded_as_a_whole():
    property_of(60)()


@pytest.mark.full  # three minutes of a core that has nothing else to do
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_two_thousand_damaged_states_are_refused_as_a_whole_or_loaded_as_a_whole():
    property_of(2000)()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", BROKEN["a_damaged_state_is_refused_or_loads_whole"])
def test_the_property_fails_for_what_loads_in_part_or_refuses_too_late(monkeypatch, cls):
    sick = Patient(Subject(cls))
    monkeypatch.setitem(globals(), "patient", lambda name, variant: sick)
    with pytest.raises(AssertionError, match="expected"):
        property_of(60)()


def test_every_kind_of_damage_occurs_and_leaves_the_original_alone():
    sound = patient("AdamW", "plain").sound
    before = bits(sound)
    for kind in KINDS:
        changed = 0
        for seed in range(12):
            spoiled = copy.deepcopy(sound)
            damage = kind(spoiled, Random(seed))
            changed += damage is not None and (bits(spoiled) != before or str(spoiled) != str(sound))
        assert changed or kind.__name__ == "_reorder", kind.__name__
    for seed in range(40):
        damaged(sound, Random(seed))
    assert bits(sound) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda optimizer: optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].mul_(2), "'exp_avg' of 'p0' is"),
        (lambda optimizer: optimizer.param_groups[0].update(lr=0.75), "'lr' of group 0 is 0.75"),
    ],
)
def test_what_was_not_loaded_is_seen(change, told):
    sick = Patient(Subject(AdamW))
    trial = sick.trial(0)
    trial.optimizer.load_state_dict(sick.sound)
    assert list(losses(sick.sound, sick.sound, trial.optimizer)) == []
    with torch.no_grad():
        change(trial.optimizer)
    [(loss, _)] = losses(sick.sound, sick.sound, trial.optimizer)
    assert loss.startswith(told)


def test_what_was_missing_is_seen():
    sick = Patient(Subject(AdamW))
    trial, spoiled = sick.trial(0), copy.deepcopy(sick.sound)
    del spoiled["state"][0]["exp_avg"], spoiled["param_groups"][0]["lr"]
    trial.optimizer.load_state_dict(spoiled, strict=False)
    lost = [loss for loss, _ in losses(sick.sound, spoiled, trial.optimizer)]
    assert lost == ["'exp_avg' of 'p0' was missing", "group 0 keeps a 'lr' of its own"]
