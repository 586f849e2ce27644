"""What fuzzing found in the reading of state dicts: each fault is refused by its name, and nothing was changed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from core.kit import values
from torch import nn

import hbcore
from hb_adam import AdamW
from hb_muon import Muon
from hbcore.errors import CheckpointError, HyperparameterError, StateWarning

NAMES = ("head.weight", "head.bias")


def trained(cls=AdamW):
    params = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]
    optimizer = cls(list(zip(NAMES, params, strict=True)), lr=0.1, compile="eager")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, params


def group(key, value):
    return lambda saved: saved["param_groups"][0].update({key: value})


def slot(name, change):
    return lambda saved: saved["state"][0].update({name: change(saved["state"][0][name])})


def record(**changes):
    def spoil(saved):
        content = json.loads(saved["param_groups"][0]["hbcore"])
        saved["param_groups"][0]["hbcore"] = json.dumps({**content, **changes})

    return spoil


DAMAGE = {
    "an empty entry": (lambda saved: saved["state"].update({0: {}}), "head.weight.* has no state"),
    "no step": (lambda saved: saved["state"][0].pop("step"), "head.weight.* has no 'step'"),
    "a step that is text": (slot("step", lambda _: "3"), "head.weight.* has step '3'"),
    "no values": (slot("exp_avg", lambda t: t.to("meta")), "head.weight.* has state 'exp_avg' on the device meta"),
    "a sparse tensor": (
        slot("exp_avg", lambda t: t.to_sparse()),
        "head.weight.* has state 'exp_avg' .*torch.sparse_coo",
    ),
    "keys that are lists": (group("params", [[0], [1]]), r"group 0 of the checkpoint has \[0\] among its 'params'"),
    "a key twice": (group("params", [0, 0]), "group 0 of the checkpoint has the parameter 0, which is in group 0 already"),
    "too many names": (group("param_names", ["a", "b", "c"]), "group 0 .* has 2 parameters and 3 'param_names'"),
    "names that are one string": (
        group("param_names", "ab"),
        "group 0 .* has 'ab' as 'param_names'; expected a list of strings",
    ),
    "names that are numbers": (group("param_names", [0, 1]), r"group 0 .* has \[0, 1\] as 'param_names'"),
    "a name twice": (group("param_names", ["head.bias"] * 2), "group 0 .* has several parameters named 'head.bias'"),
    "a number in a list": (group("eps", [0.1]), r"eps=.* is a (list|tuple); pass one number"),
    "numbers that are one": (group("betas", 0.5), "betas=0.5 is not 2 numbers"),
    "a deep record": (group("hbcore", "[" * 100_000), "group 0: its 'hbcore' entry"),
    "a record with a huge number": (record(seed=10**30, progress={"x": 10**400}), "group 0: its 'hbcore' entry"),
    "a record with a fraction for a version": (record(rules={"adam": 1.5}), "group 0: its 'hbcore' entry"),
    "a record with text for a number": (record(progress={"x": "nan"}), "group 0: its 'hbcore' entry"),
    "a record that freezes what is not there": (record(frozen=[7]), r"group 0 .* has \[7\] as 'frozen'"),
    "a record that freezes from the end": (record(frozen=[-1]), r"group 0 .* has \[-1\] as 'frozen'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_its_name_and_changes_nothing(damage):
    spoil, told = DAMAGE[damage]
    optimizer, params = trained()
    saved, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy((optimizer.state_dict(), values(params)))
    spoil(saved)
    with pytest.raises(CheckpointError, match=told):
        optimizer.load_state_dict(saved)
    assert str(optimizer.state_dict()) == str(before[0])
    assert all(torch.equal(p, was) for p, was in zip(params, before[1], strict=True))


@pytest.mark.parametrize("given", [None, [], "state", 3])
def test_what_is_no_dict_is_refused(given):
    optimizer, _ = trained()
    for each in (optimizer, hbcore.get("SAMWrapper")([nn.Parameter(torch.ones(2))])):
        with pytest.raises(CheckpointError, match=f"a state dict is a dict .*; got a {type(given).__name__}"):
            each.load_state_dict(given)


@pytest.mark.parametrize("damaged", [None, [], {"params": [[0]]}, {"params": None}])
def test_a_composites_groups_are_looked_at_first(damaged):
    optimizer = hbcore.get("SAMWrapper")([nn.Parameter(torch.ones(2))])
    saved = optimizer.state_dict()
    with pytest.raises(CheckpointError, match="SAMWrapper: param group 0"):
        optimizer.load_state_dict({**saved, "param_groups": [damaged]})


def test_a_number_that_is_missing_is_told():
    optimizer, _ = trained()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["betas"]
    with pytest.warns(StateWarning, match="param group 0 of the checkpoint has no 'betas'; this optimizer's own apply"):
        optimizer.load_state_dict(saved)


def test_a_rule_is_not_loaded_in_part_without_a_record_either():
    optimizer, _ = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["hbcore"], saved["state"][0]["exp_avg"]
    with pytest.raises(CheckpointError, match=r"head.weight.* has no 'exp_avg'"):
        optimizer.load_state_dict(saved)


def test_corrections_without_the_mark_of_their_weights_are_told():
    params = [nn.Parameter(torch.ones(4))]
    optimizer = AdamW([("w", params[0])], param_ecc="bf16+8", compile="eager")
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["param#sum"] = "text"
    with pytest.raises(CheckpointError, match=r"w.* has 'text' for state 'param#sum'"):
        optimizer.load_state_dict(saved)
    del saved["state"][0]["param#sum"]
    with pytest.warns(StateWarning, match=r"w.* has no 'param#sum' in the checkpoint"):
        optimizer.load_state_dict(saved)


def test_numbers_that_the_class_takes_apart_are_looked_at_first():
    optimizer, _ = trained(Muon)
    for value in (-1.0, (), {}):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["betas"] = value
        with pytest.raises(CheckpointError, match=r"group 0.*(betas=|IndexError)"):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("options", [{"eps": [0.1]}, {"lr": (0.1,)}, {"weight_decay": (0.1, 0.2)}])
def test_a_constructor_refuses_several_numbers_for_one(options):
    with pytest.raises(HyperparameterError, match=f"{next(iter(options))}=.* pass one number"):
        AdamW([nn.Parameter(torch.ones(2, 2))], **options)
