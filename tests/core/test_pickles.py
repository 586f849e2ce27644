"""Optimizers that version 0.1.0 pickled load, and train on as they would have: whole objects are what some trainers save.

The files were written by that version before the engine was rearranged; they are not to be written anew.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from core.rules import rule

from hbcore.api import Optimizer

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "pickles").glob("*.pt"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_an_optimizer_pickled_by_0_1_0_trains_on(path):
    saved = torch.load(path, weights_only=True)
    model, optimizer = pickle.loads(saved["pickle"].numpy().tobytes())
    for t in range(3, 6):
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
    # The dampening of PSGD, 1e-7 of a gradient, is drawn from another stream since.
    size = 1e-6 if path.stem == "PSGDKron" else 1e-8
    for p, after in zip(model.parameters(), saved["after"], strict=True):
        torch.testing.assert_close(p.detach(), after, rtol=size, atol=size / 100)


def test_an_entry_may_stand_for_what_the_class_did_before_it_had_one(monkeypatch):
    old = Growing([torch.nn.Parameter(torch.ones(3))], compile="eager")
    pickled = pickle.dumps(old)
    monkeypatch.setitem(globals(), "Growing", Grown)
    monkeypatch.setattr(Grown, "formerly", {"shares": (1.0, 2.0)})
    new = pickle.loads(pickled)
    assert new.param_groups[0]["shares"] == (1.0, 2.0)
    assert Grown([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["shares"] == (0.25, 0.5)


class Growing(Optimizer):
    """What was pickled: a class that declares less than it does now."""

    lr: float = 0.1


class Grown(Optimizer):
    """The same class in a newer version, with entries that decide on the step."""

    lr: float = 0.1
    beta: float | None = None
    shares: tuple[float, float] = (0.25, 0.5)

    def normalise(self, h):
        return {**h, "beta": 0.5 if h["beta"] is None else h["beta"]}

    @staticmethod
    def chain(h):
        return (rule(lambda self, u, s, c: (u * self.beta * h.shares[1], {"m": u}))(h.beta),)


Growing.chain = staticmethod(lambda h: (rule()(0.5),))


def test_entries_that_a_class_did_not_have_when_it_was_pickled_have_their_defaults(monkeypatch):
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    old = Growing([{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "beta": 1.0}], compile="eager")
    pickled = pickle.dumps(old)
    monkeypatch.setitem(globals(), "Growing", Grown)
    new = pickle.loads(pickled)
    assert type(new) is Grown
    assert [(g["lr"], g["beta"], g["shares"]) for g in new.param_groups] == [(0.1, 0.5, (0.25, 0.5)), (0.5, 1.0, (0.25, 0.5))]
    new.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    for group in new.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    new.step()
    assert [float(g["params"][0].detach()[0]) for g in new.param_groups] == pytest.approx([1 - 0.025, 1 - 0.25, 1 - 0.025])
    again = pickle.loads(pickle.dumps(new))
    assert [g["beta"] for g in again.param_groups] == [0.5, 1.0, 0.5]
