"""What users give an optimizer: numbers as text, sequences of every kind, parameters that change shape or have none yet."""

from __future__ import annotations

import copy
import linecache
import pickle
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from core.kit import gradients, parameters, run
from core.test_user_faults import FAMILIES, SHAPES, saved, trained

import hbcore
from hb_adam import AdamW
from hbcore import registry
from hbcore.errors import CheckpointError, HyperparameterError, OptionError, ParameterError


@pytest.mark.parametrize("name", FAMILIES)
def test_text_as_a_number_in_a_group_is_refused_by_the_step(name):
    """YAML leaves ``1e-3`` as text; a step that took it would save what no load takes."""

    def write(optimizer, t):
        optimizer.param_groups[0]["lr"] = "1e-3"

    with pytest.raises(HyperparameterError, match=r"lr='1e-3' in a param group is a str"):
        trained(name, before=write)


@pytest.mark.parametrize("name", FAMILIES)
def test_data_of_another_shape_is_refused_until_the_state_is_deleted(name):
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = hbcore.get(name)([p], lr=0.01)
    run(optimizer, [p], [[torch.ones(4, 4)]])
    p.grad = None
    p.data = torch.ones(12, 4)
    p.grad = torch.ones(12, 4)
    with pytest.raises(ParameterError, match=r"parameter number 0 .* another shape; its state is for \(4, 4\)\. Delete"):
        optimizer.step()
    del optimizer.state[p]
    optimizer.step()
    run(optimizer, [p], [[torch.ones(12, 4)]])  # some rules only prepare their state at the first gradient
    assert p.isfinite().all() and not torch.equal(p, torch.ones(12, 4))


class ListConfig(Sequence):
    """As OmegaConf's."""

    def __init__(self, content):
        self.content = content

    def __getitem__(self, i):
        return self.content[i]

    def __len__(self):
        return len(self.content)


@pytest.mark.parametrize("make", [list, ListConfig, np.array], ids=["list", "ListConfig", "ndarray"])
@pytest.mark.parametrize("where", ["constructor", "group", "later"])
def test_any_sequence_is_a_tuple(make, where):
    betas = make([0.5, 0.6])

    def write(optimizer, t):
        if where == "later":
            optimizer.param_groups[0]["betas"] = betas

    expected = trained("AdamW", betas=(0.5, 0.6))
    if where == "group":
        params = parameters(SHAPES)
        optimizer = AdamW([{"params": params, "betas": betas}], lr=0.01)
        run(optimizer, params, gradients(4, SHAPES))
        got = optimizer, [p.detach() for p in params]
    else:
        got = trained("AdamW", before=write, **({"betas": betas} if where == "constructor" else {}))
    assert all(map(torch.equal, expected[1], got[1]))
    assert all(map(torch.equal, saved(expected[0]), saved(got[0])))
    assert got[0].state_dict()["param_groups"][0]["betas"] == (0.5, 0.6)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_lazy_parameters_are_taken_before_they_have_a_shape(name, named):
    def build(lazy):
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.LazyLinear(8) if lazy else torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
        optimizer = hbcore.get(name)(model.named_parameters() if named else model.parameters(), lr=0.01)
        return model, optimizer

    (model, optimizer), (plain, usual) = build(True), build(False)
    model(torch.zeros(1, 6))
    model.load_state_dict(plain.state_dict())
    for t in range(3):
        for m, o in ((model, optimizer), (plain, usual)):
            m.zero_grad()
            m(torch.randn(4, 6, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            o.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_a_learning_rate_of_zero_is_one_to_start_from():
    with pytest.warns(UserWarning, match="max_lr"):
        optimizer = hbcore.get("AdamC")(parameters(SHAPES), lr=0.0)
    assert optimizer.param_groups[0]["max_lr"] == 0.0025


def is_matrix(p):
    return p.ndim > 1


def split(params, **options):
    return hbcore.SplitOpt(params, [{"optimizer": "Muon", "when": is_matrix}, {"optimizer": "AdamW"}], **options)


@pytest.mark.parametrize("make", [AdamW, split], ids=["AdamW", "SplitOpt"])
@pytest.mark.parametrize("value", [5, {"x": 1}, "text"], ids=str)
def test_an_entry_of_the_users_own_in_the_state_is_kept_saved_and_loaded(make, value):
    params, others = parameters(SHAPES), parameters(SHAPES)
    optimizer, other = make(params, lr=0.01), make(others, lr=0.01)
    run(optimizer, params, gradients(2, SHAPES))
    optimizer.state["mine"] = value
    run(optimizer, params, gradients(2, SHAPES))
    assert optimizer.state["mine"] == value
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.state["mine"] == value
    assert pickle.loads(pickle.dumps(optimizer)).state["mine"] == value


def test_an_optimizer_without_names_takes_those_of_the_checkpoint():
    params = parameters(SHAPES)
    named = AdamW([(f"layer.{i}", p) for i, p in enumerate(params)], lr=0.01)
    run(named, params, gradients(1, SHAPES))
    other = AdamW(parameters(SHAPES), lr=0.01)
    other.load_state_dict(copy.deepcopy(named.state_dict()))
    assert other.param_groups[0]["param_names"] == [f"layer.{i}" for i in range(len(params))]
    other.load_state_dict(copy.deepcopy(named.state_dict()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_parameter_that_was_saved_frozen_starts_afresh(name):
    params, others = parameters(SHAPES), parameters(SHAPES)
    params[0].requires_grad_(False)
    optimizer, other = (hbcore.get(name)(ps, lr=0.01) for ps in (params, others))
    for grads in gradients(3, SHAPES):
        run(optimizer, params[1:], [grads[1:]])
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(saved)
    run(other, others, gradients(2, SHAPES))
    assert all(p.isfinite().all() for p in others)
    assert float(other.state[others[1]]["step"]) >= 4  # SOAP counts no step at its first gradient
    del saved["state"][1]  # one that was trained is missed
    with pytest.raises(CheckpointError, match=r"number 1 .* has no state"):
        other.load_state_dict(saved)


def test_a_group_says_which_weights_a_schedule_free_optimizer_holds():
    params = parameters(SHAPES)
    optimizer = hbcore.get("SFAdamW")(params, lr=0.01)
    run(optimizer, params, gradients(1, SHAPES))
    assert optimizer.param_groups[0]["train_mode"] is True
    optimizer.eval()
    assert optimizer.param_groups[0]["train_mode"] is False
    assert optimizer.state_dict()["param_groups"][0]["train_mode"] is False
    assert "train_mode" not in AdamW(parameters(SHAPES)).param_groups[0]


def test_sam_takes_an_instance_with_its_parameters_as_heavyball_does():
    params = parameters(SHAPES)
    inner = AdamW(params, lr=0.01)
    assert hbcore.get("SAMWrapper")(params, wrapped_optimizer=inner).children == [inner]
    with pytest.raises(OptionError, match="pass it alone, or with those parameters"):
        hbcore.get("SAMWrapper")(params[:1], wrapped_optimizer=inner)


@pytest.mark.parametrize("name", ["Muon", "SOAP", "PSGDKron"])
def test_torchs_new_setting_of_precision_is_left_as_it_is(name):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no such setting")
    expected, before = trained(name)[1], matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert all(map(torch.equal, trained(name)[1], expected))
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_beta_none_is_the_default():
    assert hbcore.get("PSGDKron")(parameters(SHAPES), beta=None).param_groups[0]["beta"] == 0.9


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_groups_are_added_in_a_time_that_does_not_grow_with_their_number(name):
    """The work for one group is bounded, counted in Python calls: it used to grow with those before it."""

    def calls(count):
        groups = [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 0.01 * i} for i in range(count)]
        optimizer, counted = hbcore.get(name)(groups), 0
        assert len(optimizer.param_groups) == count  # reading them brings their strings up to date, once

        def count_call(frame, event, argument):
            nonlocal counted
            counted += event == "call" and frame.f_code.co_name != "__hash__"  # torch hashes all parameters

        sys.setprofile(count_call)
        try:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))]})
        finally:
            sys.setprofile(None)
        return counted

    assert calls(200) < calls(20) * 1.5


@pytest.mark.parametrize(("name", "most"), [("AdamW", 750), ("Muon", 1800), ("SOAP", 1850), ("PSGDKron", 1700)])
def test_each_of_many_groups_takes_the_same_time_to_build(name, most):
    """The work for one group is bounded, counted in calls of Python and C: each used to be compared with all before it."""

    def calls(count):
        groups = [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": 0.01 * i} for i in range(count)]
        counted = 0

        def count_call(frame, event, argument):
            nonlocal counted
            counted += event in ("call", "c_call")

        make = hbcore.get(name)
        sys.setprofile(count_call)
        try:
            make(groups)
        finally:
            sys.setprofile(None)
        return counted

    calls(2)  # what is imported and cached
    few, some, many = map(calls, (20, 120, 220))
    assert 100 < (some - few) / 100 < most
    assert many - some < 1.01 * (some - few)


def test_a_group_that_is_added_later_is_compared_with_all_others():
    params = parameters(SHAPES)
    optimizer = AdamW([{"params": [p]} for p in params[:3]])
    with pytest.raises(ParameterError, match="is the same tensor as parameter number 0 of group 1"):
        optimizer.add_param_group({"params": [params[1]]})
    assert [group["params"] for group in optimizer.param_groups] == [[p] for p in params[:3]]
    with pytest.raises(ParameterError, match="is the same tensor as"):
        AdamW([{"params": [params[0]]}, {"params": [params[1]]}, {"params": [params[0]]}])


def test_optimizers_made_anew_leave_no_source_behind():
    def make():
        params = parameters(SHAPES)
        run(AdamW(params, lr=0.01), params, gradients(1, SHAPES))

    make()
    before = len(linecache.cache)
    for _ in range(5):
        make()
    assert len(linecache.cache) == before


def pairs():
    """Every optimizer with each of its fields that is a tuple of numbers."""
    for name in registry.list_optimizers():
        declared = getattr(hbcore.get(name), "_declared", None)  # wrappers of optimizers have no hyperparameters
        for field, default in declared.fields.items() if declared else ():
            if isinstance(default, tuple) and all(isinstance(x, (int, float)) for x in default):
                yield name, field


@pytest.mark.parametrize(("name", "field"), [*pairs()], ids=str)
def test_what_is_no_tuple_is_named_where_one_belongs(name, field):
    for value in (0.5, None, "x"):
        with pytest.raises(HyperparameterError, match=f"{field}={value!r} is not"):
            hbcore.get(name)(parameters(((4, 4),)), **{field: value})
        optimizer = hbcore.get(name)(parameters(((4, 4),)))
        with pytest.raises(HyperparameterError, match=f"{field}={value!r} is not"):
            optimizer.add_param_group({"params": parameters(((3, 4),)), field: value})
