"""What users give an optimizer: numbers as text, sequences of every kind, parameters that change shape or have none yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from core.kit import gradients, parameters, run
from core.test_user_faults import FAMILIES, SHAPES, saved, trained

import hbcore
from hb_adam import AdamW
from hbcore.errors import HyperparameterError, ParameterError


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
