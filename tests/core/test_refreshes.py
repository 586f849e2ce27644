"""When a matrix rule's expensive part is due: exactly at the steps that its rate says, however the rates add up in floats."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hbcore.api import Domain, Optimizer, Slot, Transform, matrix_view

STEPS = 300


@dataclass(frozen=True)
class Diary(Transform):
    """Remembers the step of its last refresh, and how many there were."""

    every: int = 1
    name = "diary"
    domain = Domain.MATRIX

    def blocks(self, shape):
        return matrix_view(shape)

    def slots(self, param):
        return {"last": Slot(torch.Size(), exact=True), "count": Slot(torch.Size(), exact=True)}

    def rate(self, k):
        return 1 / self.every

    def update(self, u, s, c):
        if not c.refresh:
            return u, {}
        return u, {"last": torch.zeros_like(s["last"]) + c.step, "count": s["count"] + 1}


class Diarist(Optimizer):
    def __init__(self, params, lr=0.1, every=1, **options):
        super().__init__(params, {"lr": lr, "every": every}, options)

    @staticmethod
    def chain(h):
        return (Diary(h.every),)


def last_refreshes(optimizer, p, steps):
    """After each of ``steps``, the step of the last refresh and how many there were so far."""
    for _ in steps:
        p.grad = torch.ones_like(p)
        optimizer.step()
        state = optimizer.state[p]
        yield int(state["last"]), int(state["count"])


@pytest.mark.parametrize("every", [1, 2, 3, 7, 10, 49, 100])
def test_a_rate_of_one_in_f_refreshes_at_every_multiple_of_f_and_at_no_other_step(every):
    p = nn.Parameter(torch.ones(2, 2))
    seen = list(last_refreshes(Diarist([p], every=every, compile="eager"), p, range(STEPS)))
    assert seen == [(k // every * every, k // every) for k in range(1, STEPS + 1)]


@pytest.mark.parametrize("stop", [9, 10, 11, 95])
def test_a_resumed_training_refreshes_at_the_same_steps(stop):
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer, resumed = (Diarist([one], every=10, compile="eager") for one in (p, q))
    list(last_refreshes(optimizer, p, range(stop)))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    seen = list(last_refreshes(resumed, q, range(stop, 120)))
    assert seen == [(k // 10 * 10, k // 10) for k in range(stop + 1, 121)]
