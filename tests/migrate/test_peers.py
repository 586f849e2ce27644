"""Trainings of other libraries go on in hbcore: their state moved over, steps follow the original's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import pytorch_optimizer
import schedulefree
import torch
from migrate.peers import DionMuon, Muon
from torch import nn

import hbcore
from hbcore.errors import CheckpointError, StateWarning
from hbcore.migrate import sources
from hbcore.migrate.apply import convert_checkpoint, migrate
from hbcore.migrate.from_dion import COEFFICIENTS
from hbcore.migrate.weights import Weights

ADD = {"division_backend": "eps_add"}
JORDAN = {"method": "newton_schulz", "ns_coefficients": "jordan", "ns_steps": 5, "eps": 1e-7}
AUTHOR = {**JORDAN, "momentum": 0.95}
DION = {**ADD, "method": "newton_schulz", "ns_coefficients": COEFFICIENTS, "ns_steps": 5, "momentum": 0.95, "nesterov": False}
DION |= {"heavyball_momentum": True, "flatten": False, "scale_mode": "none"}
ANY, MATRICES, BATCHES = ((6, 4), (2, 3, 4), (7,), (3,)), ((6, 4), (5, 5), (8, 3), (4, 4)), ((2, 5, 4), (6, 4), (8, 3), (4, 4))
KERNELS = ((3, 2, 3, 3), (6, 4), (8, 3), (4, 4))
BF16 = 3e-3
"""The library orthogonalizes in bfloat16 and hbcore in the parameters' float64: entries of a factor are of about 1/2 and off by
some 2^-8, in each of 15 steps with a learning rate of 0.01, on weights of about 1."""


class Row(NamedTuple):
    """An optimizer of another library, and ours of the same rule."""

    library: str
    theirs: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    name: str
    options: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ANY
    bound: float = 1e-12
    groups: tuple[dict[str, Any], dict[str, Any]] = ({}, {"lr": 0.005})
    ours: tuple[dict[str, Any], dict[str, Any]] = ({}, {})


def sfree(**given: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: schedulefree.AdamWScheduleFree(groups, lr=0.01, **given)


def po(name: str, **given: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: getattr(pytorch_optimizer, name)(groups, lr=0.01, **given)


def alone(**given: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: Muon(groups, **{"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, **given})


def dion(**given: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda groups: DionMuon(groups, **given)


FLAGS = ({"use_muon": True}, {"use_muon": False})
AUX = (
    {"use_muon": True, "lr": 0.01, "momentum": 0.95, "weight_decay": 0.1},
    {"use_muon": False, "lr": 0.003, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1},
)
SPLIT = ((6, 4), (5, 5), (7,), (3,))
SCALAR = ({}, {"algorithm": "adamw", "lr": 0.003})

ROWS = {
    "AdamWScheduleFree": Row("schedulefree", sfree(), "SFAdamW", ADD),
    "AdamWScheduleFree, warm-up and decay": Row(
        "schedulefree", sfree(warmup_steps=10, weight_decay=0.1, r=1.0, betas=(0.95, 0.99)), "SFAdamW", ADD
    ),
    # the library adds 1e-15 to a second moment of about 1
    "ScheduleFreeAdamW": Row("pytorch_optimizer", po("ScheduleFreeAdamW", warmup_steps=8), "SFAdamW", ADD),
    "Lion": Row("pytorch_optimizer", po("Lion", weight_decay=0.1), "Lion", {}),
    "AdEMAMix": Row("pytorch_optimizer", po("AdEMAMix", weight_decay=0.1, weight_decouple=True), "AdEMAMix", ADD),
    "AdEMAMix, warm-up": Row(
        "pytorch_optimizer", po("AdEMAMix", t_alpha_beta3=30.0), "AdEMAMix", {**ADD, "alpha_warmup": 30, "beta3_warmup": 30}
    ),
    "SGDW": Row("pytorch_optimizer", po("SGDW", momentum=0.9, weight_decay=0.1, dampening=0.2), "SGD", {}),
    "SGDW, Nesterov": Row(
        "pytorch_optimizer", po("SGDW", momentum=0.9, weight_decay=0.1, nesterov=True, weight_decouple=False), "SGD",
        {"nesterov": True, "decoupled_weight_decay": False},
    ),
    "pytorch_optimizer's Muon": Row(
        "pytorch_optimizer", po("Muon"), "MuonAdamW", {**ADD, **AUTHOR, "adjust_lr_fn": "original"}, SPLIT, BF16, FLAGS, FLAGS
    ),
    "pytorch_optimizer's Muon, adjusted": Row(
        "pytorch_optimizer", po("Muon", use_adjusted_lr=True, ns_coeffs="quintic", weight_decay=0.1), "Muon",
        {**ADD, **AUTHOR, "ns_coefficients": "you", "adjust_lr_fn": "match_rms_adamw"}, MATRICES, BF16, (FLAGS[0], FLAGS[0]),
    ),
    "the author's Muon": Row("muon", alone(), "Muon", AUTHOR, MATRICES),
    "the author's Muon, batches": Row("muon", alone(), "Muon", {**AUTHOR, "flatten": False}, BATCHES),
    "the author's Muon, convolutions": Row("muon", alone(), "Muon", AUTHOR, KERNELS),
    "the author's Muon and Adam": Row(
        "muon", lambda groups: Muon(groups), "MuonAdamW", {**ADD, **AUTHOR}, SPLIT, 1e-12, AUX, FLAGS
    ),
    "dion's Muon": Row("dion", dion(adjust_lr=None), "Muon", DION, BATCHES),
    "dion's Muon, tall": Row("dion", dion(nesterov=True), "Muon", {**DION, "nesterov": True, "scale_mode": "scale"}, MATRICES),
    "dion's Muon, cautious": Row(
        "dion", dion(adjust_lr="rms_norm", cautious_wd=True, flatten=True), "Muon",
        {**DION, "adjust_lr_fn": "match_rms_adamw", "scale_mode": "scale", "flatten": True, "cautious_weight_decay": True},
        KERNELS,
    ),
    "dion's Muon and AdamW": Row(
        "dion", dion(adjust_lr=None), "MuonAdamW", DION, SPLIT, 1e-12, SCALAR, FLAGS
    ),
}  # fmt: skip
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def weights(row: Row, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Four parameters, of which the second never has a gradient."""
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in row.shapes]


def grouped(params: list[nn.Parameter], entries: tuple[dict[str, Any], dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"params": params[:2], **entries[0]}, {"params": params[2:], **entries[1]}]


def run(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in (params[0], params[2]):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        optimizer.step()


def trained(row: Row, dtype: torch.dtype = torch.float64) -> tuple[Any, list[nn.Parameter]]:
    params = weights(row, dtype)
    optimizer = row.theirs(copy.copy(grouped(params, row.groups)))
    if row.name == "SFAdamW":
        optimizer.train()
    run(optimizer, params, range(5))
    return optimizer, params


def copied(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def furthest(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    return max(((p - q).norm() / q.norm()).item() for p, q in zip(ours, theirs, strict=True))


def build(row: Row, params: list[nn.Parameter], **more: Any) -> Any:
    return hbcore.get(row.name)(grouped(params, row.ours), lr=9.0, **{**row.options, "compile": "eager", **more})


@every_row
def test_a_training_goes_on_in_an_optimizer_that_the_user_built(row):
    optimizer, params = trained(row)
    ours = copied(params)
    other = build(row, ours)
    saved = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", StateWarning)
        other.load_state_dict(convert_checkpoint(saved, other))
    run(optimizer, params, range(5, 20))
    run(other, ours, range(5, 20))
    assert furthest(ours, params) < row.bound
    assert furthest(ours, copied(weights(row))) > 1e-2, "nothing moved"


@every_row
def test_a_training_goes_on_as_the_command_tells(row):
    optimizer, params = trained(row)
    ours = copied(params)
    saved = copy.deepcopy(optimizer.state_dict())
    assert sources.recognise(saved).name == row.library
    names = [["a", "b"], ["c", "d"]]
    tensors = [[p.detach() for p in ours[:2]], [p.detach() for p in ours[2:]]]
    given = None if any("use_muon" in g for g in row.ours) else Weights(names, tensors)
    migrated = migrate(saved, weights=given)
    assert migrated.optimizer == row.name
    other = hbcore.get(row.name)(grouped(ours, row.ours), **migrated.options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "state 'exp_avg|state 'momentum_buffer", StateWarning)
        other.load_state_dict(migrated.state_dict)
    run(optimizer, params, range(5, 20))
    run(other, ours, range(5, 20))
    assert furthest(ours, params) < row.bound


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("key", ["AdamWScheduleFree", "ScheduleFreeAdamW"])
def test_both_sets_of_schedule_free_weights_arrive(key, training):
    row = ROWS[key]
    optimizer, params = trained(row)
    if not training:
        optimizer.eval()
    ours = copied(params)
    other = build(row, ours)
    other.load_state_dict(convert_checkpoint(copy.deepcopy(optimizer.state_dict()), other))
    optimizer.eval()
    other.eval()
    assert furthest(ours, params) < 1e-14
    optimizer.train()
    other.train()
    assert furthest(ours, params) < 1e-14
    run(optimizer, params, range(5, 10))
    run(other, ours, range(5, 10))
    assert furthest(ours, params) < row.bound


def test_the_report_tells_what_became_of_every_entry():
    saved = trained(ROWS["dion's Muon and AdamW"])[0].state_dict()
    notes = migrate(saved).notes
    dropped = {note.where for note in notes if note.kind == "dropped"}
    assert dropped == {"param_groups[1]['flatten']", "param_groups[1]['nesterov']"}, "AdamW has no use for them"
    told = [note.where for note in notes if note.kind == "mapped"]
    assert told.count("state[...]['momentum']") == 2, "Muon's and AdamW's"
    entries = {f"param_groups[{g}][{k!r}]" for g, group in enumerate(saved["param_groups"]) for k in group if k != "params"}
    assert entries == {where for where in told if where.startswith("param_groups")} | dropped


def test_schedule_free_state_needs_the_weights():
    with pytest.raises(CheckpointError, match="--model"):
        migrate(copy.deepcopy(trained(ROWS["AdamWScheduleFree"])[0].state_dict()))


# --- what hbcore has no rule for --------------------------------------------------------------------------------------

REFUSED = {
    "ADOPT": ("clips its quotients", {}), "EXAdam": ("ADOPT", {}), "RAdam": ("ADOPT", {}),
    "AdamC": ("largest learning rate", {}),
    "LaProp": ("learning rates of past steps", {}), "SCION": ("norm", {}), "SOAP": ("SOAP", {}),
    "ScheduleFreeSGD": ("second moment", {}), "ScheduleFreeRAdam": ("rectifies", {}),
    "AdaBelief": ("none of pytorch_optimizer's optimizers", {}), "Tiger": ("none of pytorch_optimizer's optimizers", {}),
    "Lion": ("weight_decouple=False", {"weight_decay": 0.1, "weight_decouple": False}),
    "AdEMAMix": ("fixed_decay=True", {"weight_decay": 0.1, "weight_decouple": True, "fixed_decay": True}),
    "ScheduleFreeAdamW": ("decoupling_c=2", {"decoupling_c": 2}),
}  # fmt: skip


def saved_by(optimizer: Any, *params: nn.Parameter) -> dict[str, Any]:
    if hasattr(optimizer, "train"):
        optimizer.train()
    for seed in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("name", REFUSED)
def test_another_rule_is_refused_by_name(name):
    message, options = REFUSED[name]
    p = nn.Parameter(torch.ones(4, 3))
    saved = saved_by(getattr(pytorch_optimizer, name)([p], **options), p)
    assert sources.recognise(saved).name == "pytorch_optimizer"
    with pytest.raises(CheckpointError, match=message):
        migrate(saved)


@pytest.mark.parametrize(("name", "message"), [("SGDScheduleFree", "second moment"), ("RAdamScheduleFree", "rectifies")])
def test_schedulefrees_other_rules_are_refused_by_name(name, message):
    p = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        migrate(saved_by(getattr(schedulefree, name)([p], lr=0.1), p))


STAND_INS = {
    "wide matrices": (DionMuon, {}, (3, 6), "spectral_norm"),
    "Lion beside Muon": (DionMuon, {"algorithm": "lion"}, (4, 3), "'lion'"),
    "heads": (DionMuon, {"num_heads": 2, "adjust_lr": None}, (4, 3), "num_heads=2"),
    "tall convolutions": (Muon, {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.9}, (20, 1, 3, 3), "kernel's sides"),
}


@pytest.mark.parametrize("case", STAND_INS)
def test_settings_that_hbcore_has_no_rule_for_are_refused_by_name(case):
    make, options, shape, message = STAND_INS[case]
    p = nn.Parameter(torch.ones(shape))
    with pytest.raises(CheckpointError, match=message):
        migrate(saved_by(make([{"params": [p]}], **options), p))


def test_the_wrong_target_and_other_structure_are_named():
    optimizer, params = trained(ROWS["Lion"])
    with pytest.raises(CheckpointError, match="Lion, and not in AdamW"):
        convert_checkpoint(optimizer.state_dict(), hbcore.get("AdamW")(grouped(params, ({}, {}))))
    row = ROWS["dion's Muon"]
    saved = trained(row)[0].state_dict()
    with pytest.warns(StateWarning, match="nesterov=False in param group ., and this Muon goes on with True"):
        convert_checkpoint(saved, build(row, weights(row), nesterov=True))


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no groups": lambda s: {**s, "param_groups": []},
    "a group that is none": lambda s: {**s, "param_groups": [None]},
    "a parameter twice": lambda s: s["param_groups"][0]["params"].append(0),
    "unhashable parameters": lambda s: s["param_groups"][0]["params"].append([]),
    "state that is none": lambda s: s["state"].update({0: 5}),
    "a slot of text": lambda s: s["state"][0].update(exp_avg="gone"),
    "a slot of another shape": lambda s: s["state"][0].update(exp_avg=torch.ones(2, 2, dtype=torch.float64)),
    "a NaN": lambda s: s["state"][0]["exp_avg"].fill_(float("nan")),
    "a step of text": lambda s: s["param_groups"][0].update(step="many"),
    "a step below 0": lambda s: s["param_groups"][0].update(step=-1),
    "betas of text": lambda s: s["param_groups"][0].update(betas="high"),
    "betas that are none": lambda s: s["param_groups"][0].update(betas=None),
    "a rate of text": lambda s: s["param_groups"][0].update(lr="high"),
    "a group too many": lambda s: s["param_groups"].append({**s["param_groups"][0], "params": [9]}),
    "a missing entry": lambda s: s["param_groups"][0].pop("betas"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_malformed_checkpoint_is_refused(case):
    row = ROWS["Lion"]
    optimizer, params = trained(row)
    saved = copy.deepcopy(optimizer.state_dict())
    changed = HOSTILE[case](saved)
    saved = changed if isinstance(changed, dict) and "state" in changed else saved
    other = build(row, copied(params))
    with pytest.raises(CheckpointError):
        convert_checkpoint(saved, other, source="pytorch_optimizer")
    assert not other.state


@pytest.mark.parametrize("source", sources.SOURCES, ids=lambda s: s.name)
def test_recognising_never_raises(source):
    strange = [
        None,
        5,
        [],
        {},
        {"state": 1},
        {"state": {}, "param_groups": [{}]},
        {"state": {}, "param_groups": [{"params": 5}]},
    ]
    strange.append({"state": {0: [1]}, "param_groups": [{"params": [0], 5: 6}]})
    assert not any(source.recognises(thing) for thing in strange)
