"""The sizes of updates and weights that ``hbcore compare`` measures."""

from __future__ import annotations

import math

import pytest
import torch

from hbcore.cli import compare

MODULE = """
import torch
from torch import nn

class Known(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([3.0, 4.0, 0.0, 0.0]))
        self.b = nn.Parameter(torch.tensor(2.0, dtype=torch.bfloat16))
        self.empty = nn.Parameter(torch.zeros(0, 3))
    def loss(self, x):
        return (self.a * torch.tensor([1.0, 2.0, 2.0, 0.0])).sum() + 4 * self.b.float() + 0 * self.empty.sum()

def data(split, batch_size, seed):
    while True:
        yield (torch.zeros(batch_size),)
        if split == "validation":
            return
"""


def of_torch(name):
    return getattr(torch.optim, name)


@pytest.fixture
def known(tiny_run, monkeypatch):
    """Runs SGD, whose updates are ``lr`` times these constant gradients."""
    monkeypatch.setattr("hbcore.cli.compare.plot.draw", lambda *_: None)
    (tiny_run.folder / "known.py").write_text(MODULE)

    def run(*words, steps=7):
        given = ["SGD", "--model", "known:Known", "--optimizer-args", "lr=0.5", *words]
        assert tiny_run(compare, *given, resolve=of_torch, steps=steps, data="known:data") == 0
        return tiny_run.json()["runs"][0]

    return run


def test_they_are_root_mean_squares_of_the_step_and_of_the_weights_before_it(known):
    norms = known("--norms-every", "3")["norms"]
    assert norms["step"] == [1, 3, 6]
    assert set(norms["update_rms"]) == set(norms["weight_rms"]) == {"a", "b"}, "an empty parameter has no size"
    assert norms["update_rms"]["a"] == pytest.approx([0.5 * 3 / 2] * 3)
    assert norms["update_rms"]["b"] == pytest.approx([2.0] * 3)
    before = [[3 - 0.5 * k, 4 - k, -k, 0.0] for k in (0, 2, 5)]
    assert norms["weight_rms"]["a"] == pytest.approx([math.sqrt(sum(x * x for x in w) / 4) for w in before])
    assert norms["weight_rms"]["b"] == pytest.approx([2.0, 2.0, 8.0])


def test_they_are_measured_twenty_times_or_never_and_change_nothing(known):
    often = known(steps=60)
    never = known("--norms-every", "0", steps=60)
    assert often["norms"]["step"] == [1, *range(3, 61, 3)]
    assert never["norms"] == {"step": [], "update_rms": {}, "weight_rms": {}}
    assert often["train"]["loss"] == never["train"]["loss"]
