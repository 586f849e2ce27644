"""Loading is exact, matches by name, and happens entirely or not at all."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from core.kit import distance, gradients, mlp, parameters, run, same, train, values
from rounding import drift

from hb_adam import SGD, AdamW
from hbcore.errors import CheckpointError, StateWarning


def trained(dtype=torch.float32, cls=AdamW, **options):
    params = parameters(dtype=dtype)
    optimizer = cls(params, **options)
    run(optimizer, params, gradients(3, dtype=dtype))
    return params, optimizer


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, entry in theirs.items():
        assert ours[key].keys() == entry.keys()
        for slot, tensor in entry.items():
            assert ours[key][slot].dtype == tensor.dtype, slot
            assert torch.equal(ours[key][slot], tensor), slot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [AdamW, SGD])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_state_dict_comes_back_as_it_was_and_training_goes_on(cls, dtype, storage):
    params, optimizer = trained(dtype, cls, storage_dtype=storage)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = [torch.nn.Parameter(v) for v in values(params)]
    other = cls(resumed, storage_dtype=storage)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_state(other.state_dict()["state"], optimizer.state_dict()["state"])
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    more = list(gradients(3, dtype=dtype))
    run(optimizer, params, more)
    run(other, resumed, more)
    assert same(params, resumed)


def test_loading_copies_and_never_shares():
    _, optimizer = trained()
    saved = optimizer.state_dict()
    twin = parameters()
    other = AdamW(twin)
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    run(other, twin, gradients(2))
    assert_same_state(saved["state"], before["state"])


def test_parameters_are_matched_by_name_in_any_order():
    model, twin = mlp(), mlp()
    optimizer = AdamW(model.named_parameters())
    train(model, optimizer, range(3))
    other = AdamW(list(twin.named_parameters())[::-1])
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
    twin.load_state_dict(model.state_dict())
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert distance(model.parameters(), twin.parameters()) < drift(torch.float32, 3)  # packed in another order


def test_numbers_come_from_the_checkpoint_and_structure_from_the_optimizer():
    params, optimizer = trained(cls=SGD, momentum=0.5, nesterov=True)
    optimizer.param_groups[0]["initial_lr"] = 7.0
    other = SGD(params, lr=0.5, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    [group] = other.param_groups
    assert (group["lr"], group["momentum"], group["initial_lr"], group["nesterov"]) == (0.0025, 0.5, 7.0, False)


def test_low_precision_state_saved_by_torch_is_kept_in_float32():
    """torch.optim casts state to the parameter's dtype (pytorch issue 43706); the running codec stores float32."""
    params = parameters(dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=1e-3)
    run(theirs, params, gradients(2, dtype=torch.bfloat16))
    ours = AdamW(params)
    with pytest.warns(StateWarning, match="bfloat16"):
        ours.load_state_dict(theirs.state_dict())
    run(ours, params, gradients(1, dtype=torch.bfloat16))
    assert {s[slot].dtype for s in ours.state.values() for slot in ("exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize(("saved", "running"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_the_running_codec_wins(saved, running):
    params, optimizer = trained(storage_dtype=saved)
    other = AdamW(params, storage_dtype=running)
    with pytest.warns(StateWarning, match=running):
        other.load_state_dict(optimizer.state_dict())
    run(other, params, gradients(1))
    assert {s["exp_avg"].dtype for s in other.state.values()} == {getattr(torch, running)}


def rename(saved):
    saved["param_groups"][0]["param_names"] = [f"other.{n}" for n in saved["param_groups"][0]["param_names"]]


def reshape(saved):
    saved["state"][3]["exp_avg"] = torch.zeros(2, 2)


def set_entry(key, value):
    return lambda saved: saved["param_groups"][0].__setitem__(key, value)


BROKEN = {
    "no groups": (lambda saved: saved.pop("param_groups"), "param_groups"),
    "no state": (lambda saved: saved.pop("state"), "state"),
    "too many groups": (lambda saved: saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0])), "2.*1"),
    "too few parameters": (lambda saved: saved["param_groups"][0]["params"].pop(), "5.*6"),
    "other names": (rename, "0.weight"),
    "a wrong shape": (reshape, r"2\.bias.*exp_avg.*\(2, 2\)"),
    "a missing slot": (lambda saved: saved["state"][3].pop("exp_avg_sq"), r"2\.bias.*exp_avg_sq"),
    "a slot of None": (lambda saved: saved["state"][3].update(exp_avg=None), r"2\.bias.*exp_avg"),
    "a stranger's state": (lambda saved: saved["state"].update({99: saved["state"][3]}), "99"),
    "no params": (lambda saved: saved["param_groups"][0].pop("params"), "params"),
    "a newer format": (set_entry("hbcore", '{"format": 99, "rules": {}, "codec": "plain"}'), "99"),
    "another rule version": (set_entry("hbcore", '{"format": 1, "rules": {"adam": 77}, "codec": "plain"}'), "adam.*77"),
    "garbage for metadata": (set_entry("hbcore", "}{"), "hbcore"),
    "a bad number": (set_entry("lr", -1.0), r"lr=-1"),
    "too many betas": (set_entry("betas", (0.9, 0.9, 0.9)), "betas"),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_what_does_not_fit_is_refused_and_changes_nothing(breakage):
    spoil, message = BROKEN[breakage]
    model = mlp()
    optimizer = AdamW(model.named_parameters(), lr=0.01)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    optimizer.param_groups[0]["lr"] = 0.5
    before = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict()["state"], before["state"])
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    train(model, optimizer, range(4, 5))


def test_a_fresh_optimizer_saves_and_loads():
    params = parameters()
    saved = AdamW(params, lr=0.125).state_dict()
    twin = parameters()
    other = AdamW(twin)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.125
    run(other, twin, gradients(2))
    run(AdamW(params, lr=0.125), params, gradients(2))
    assert distance(twin, params) == 0


@pytest.mark.parametrize("replaced", ["step", "exp_avg"])
def test_a_replaced_state_tensor_is_noticed(replaced):
    params, optimizer = trained()
    twin, other = trained()
    other.state[twin[0]][replaced] = optimizer.state[params[0]][replaced].clone()
    run(optimizer, params, gradients(2))
    run(other, twin, gradients(2))
    assert same(params, twin)
    other.state[twin[0]][replaced] = torch.zeros_like(other.state[twin[0]][replaced])
    run(optimizer, params, gradients(1))
    run(other, twin, gradients(1))
    assert not torch.equal(params[0], twin[0])
    assert same(params[1:], twin[1:])
