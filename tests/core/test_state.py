"""State across versions, flags, codecs and libraries; saved files stay as small as what is in them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from core.kit import distance, gradients, parameters, run
from torch import nn

import hbcore
from hb_adam import SGD, AdamW, SFAdamW
from hb_muon import Muon
from hb_psgd import PSGDKron
from hb_soap import SOAP
from hbcore.checkpoint.migrations import Migration
from hbcore.errors import CheckpointError, StateWarning
from hbcore.rules.moments import ScaleByAdam

EVERY = [AdamW, SGD, Muon, SOAP, PSGDKron, SFAdamW]


@pytest.fixture
def trained():
    params = parameters()
    optimizer = AdamW(params, lr=0.01, compile="eager")
    run(optimizer, params, gradients(3))
    return params, optimizer


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_migration_carries_older_state_over(trained, monkeypatch):
    params, optimizer = trained
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():  # as a version 1 that kept the first moment debiased would have it
        entry["debiased"] = entry.pop("exp_avg") / (1 - 0.9 ** entry["step"].item())

    def undo(slots, step, group):
        slots["exp_avg"] = slots.pop("debiased") * (1 - group["betas"][0] ** step)
        return slots

    monkeypatch.setattr(ScaleByAdam, "version", 2)
    other = AdamW(params, compile="eager")
    with pytest.raises(CheckpointError, match=r"'adam' was saved at version 1, version 2 is installed"):
        other.load_state_dict(saved)
    monkeypatch.setattr(hbcore.registry, "migrations", lambda: [Migration("adam", 1, undo)])
    other.load_state_dict(saved)
    for p in params:
        assert torch.allclose(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"], rtol=1e-6)
        assert torch.equal(other.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
        assert "debiased" not in other.state[p]


# --- flags and strictness ---------------------------------------------------------------------------------------------


def test_a_flag_turned_on_adds_its_slots_and_touches_no_other(trained):
    params, optimizer = trained
    other = AdamW(params, mars=True, compile="eager")
    other.load_state_dict(optimizer.state_dict())
    for p in params:
        assert all(torch.equal(other.state[p][k], v) for k, v in optimizer.state[p].items())
    run(other, params, gradients(1))
    assert all(any(name.startswith("mars") or "prev" in name for name in other.state[p]) or p.numel() == 0 for p in params)
    assert {int(other.state[p]["step"]) for p in params} == {4}


def test_a_flag_turned_off_leaves_its_slots_out_and_says_so():
    params = parameters()
    optimizer = AdamW(params, mars=True, compile="eager")
    run(optimizer, params, gradients(2))
    other = AdamW(params, compile="eager")
    with pytest.warns(StateWarning, match="mars"):
        other.load_state_dict(optimizer.state_dict())
    assert set(other.state[params[0]]) == {"exp_avg", "exp_avg_sq", "step"}


def test_what_is_missing_starts_afresh_if_that_is_asked_for():
    names = ["a", "b", "c"]
    params = parameters(((3, 2), (4,), (2, 2)))
    optimizer = AdamW(list(zip(names, params, strict=True)), compile="eager")
    run(optimizer, params, gradients(2, ((3, 2), (4,), (2, 2))))
    saved = optimizer.state_dict()
    more = parameters(((2, 2), (3, 2), (5,)))
    other = AdamW(list(zip(["c", "a", "new"], more, strict=True)), compile="eager")
    with pytest.raises(CheckpointError, match="'new'"):
        other.load_state_dict(saved)
    assert not other.state
    other.load_state_dict(saved, strict=False)
    assert torch.equal(other.state[more[0]]["exp_avg"], optimizer.state[params[2]]["exp_avg"])
    assert torch.equal(other.state[more[1]]["exp_avg"], optimizer.state[params[0]]["exp_avg"])
    assert more[2] not in other.state


def test_an_entry_that_nobody_asks_for_is_refused_or_left_out(trained):
    params, optimizer = trained
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["max_exp_avg_sq"] = torch.zeros(5, 7)
    other = AdamW(params)
    with pytest.raises(CheckpointError, match=r"number 0 .*'max_exp_avg_sq'"):
        other.load_state_dict(saved)
    with pytest.warns(StateWarning, match="max_exp_avg_sq"):
        other.load_state_dict(saved, strict=False)
    assert "max_exp_avg_sq" not in other.state[params[0]]


def test_a_parameter_without_state_is_an_error_and_a_frozen_one_is_not(trained):
    params, optimizer = trained
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]
    with pytest.raises(CheckpointError, match=r"number 1 .*strict=False"):
        AdamW(params).load_state_dict(saved)
    params[1].requires_grad_(False)
    AdamW(params).load_state_dict(saved)


# --- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW, SGD, Muon, PSGDKron])
def test_a_planned_optimizer_is_loaded_in_place(cls):
    params = parameters()
    optimizer = cls(params, lr=0.01, compile="eager")
    run(optimizer, params, gradients(2))
    saved = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in params]
    places = {id(t): t.data_ptr() for s in optimizer.state.values() for t in s.values()}
    run(optimizer, params, gradients(3))
    once = [p.detach().clone() for p in params]
    optimizer.load_state_dict(saved)
    assert {id(t): t.data_ptr() for s in optimizer.state.values() for t in s.values()} == places
    with torch.no_grad():
        for p, value in zip(params, before, strict=True):
            p.copy_(value)
    run(optimizer, params, gradients(3))
    assert distance(params, once) == 0


# --- sizes and codecs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", EVERY)
def test_a_file_is_as_large_as_what_is_in_it(cls):
    shapes = ((64, 64),) * 6
    params = parameters(shapes)
    optimizer = cls(params, lr=0.01, compile="eager")
    run(optimizer, params, gradients(2, shapes))
    saved = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    held = sum(t.numel() * t.element_size() for s in saved["state"].values() for t in s.values())
    assert held <= buffer.tell() < 1.05 * held + 400 * sum(map(len, saved["state"].values())) + 2000
    one = io.BytesIO()
    torch.save(saved["state"][0], one)
    assert one.tell() < 1.05 * held / 6 + 6000


@pytest.mark.parametrize(("saved", "running"), [("bf16+8", None), (None, "bf16+8"), ("bf16+8", "bf16+16")])
@pytest.mark.parametrize("cls", [AdamW, SOAP])
def test_state_changes_its_codec_on_the_way(cls, saved, running):
    params = parameters()
    optimizer = cls(params, lr=0.01, ecc=saved, compile="eager")
    run(optimizer, params, gradients(3))
    other = cls(params, lr=0.01, ecc=running, compile="eager")
    with pytest.warns(StateWarning, match="is converted to"):
        other.load_state_dict(optimizer.state_dict())
    ours, theirs = hbcore.export(other), hbcore.export(optimizer)
    for i, entry in theirs["state"].items():
        for name, value in entry.items():
            assert distance([ours["state"][i][name]], [value]) < 2e-5
            assert value.dtype == torch.float32


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ecc", [None, "bf16+16"])
@pytest.mark.parametrize(
    ("cls", "theirs"),
    [
        (AdamW, lambda p: torch.optim.AdamW(p, lr=0.5)),
        (SGD, lambda p: torch.optim.SGD(p, lr=0.5)),
    ],
)
def test_torch_goes_on_from_our_state_and_we_from_torchs(cls, theirs, ecc):
    options = {"division_backend": "eps_add"} if cls is AdamW else {}
    params, steps = parameters(), list(gradients(6))
    ours = cls(params, lr=0.01, ecc=ecc, compile="eager", **options)
    run(ours, params, steps[:3])
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    other = theirs(twins)
    other.load_state_dict(copy.deepcopy(hbcore.export(ours) if ecc else ours.state_dict()))  # torch keeps the tensors
    run(ours, params, steps[3:])
    run(other, twins, steps[3:])
    assert distance(params, twins) < 1e-6
    back = cls(twins, lr=0.3, compile="eager", **options)
    back.load_state_dict(other.state_dict())
    straight, more = [nn.Parameter(p.detach().clone()) for p in twins], list(gradients(2))
    last = theirs(straight)
    last.load_state_dict(copy.deepcopy(other.state_dict()))
    run(back, twins, more)
    run(last, straight, more)
    assert distance(twins, straight) < 1e-6


def test_an_unknown_format_is_refused(trained):
    with pytest.raises(CheckpointError, match="'pickle' is not one of torch"):
        hbcore.export(trained[1], "pickle")


# --- torch.distributed.checkpoint's own state dicts -------------------------------------------------------------------


class Net(nn.Module):
    """One layer never takes part: its parameters have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.head, self.idle = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.used(x)))


def fit(model, optimizer, steps):
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("cls", EVERY)
def test_state_dicts_of_distributed_checkpoints_resume_bit_for_bit(cls, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    straight, halted = Net(), Net()
    one, two = (cls(m.named_parameters(), lr=0.01, compile="eager") for m in (straight, halted))
    get_optimizer_state_dict(halted, two, options=options)  # leaves no trace
    fit(straight, one, range(6))
    fit(halted, two, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(halted, two, options=options))
    resumed = Net()
    resumed.load_state_dict(halted.state_dict())
    three = cls(resumed.named_parameters(), lr=0.5, compile="eager")
    set_optimizer_state_dict(resumed, three, saved, options=options)
    assert three.param_groups[0]["lr"] == 0.01
    fit(resumed, three, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
