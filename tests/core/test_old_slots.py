"""A pass may store a slot early, and must not where a later pass still reads the slot's old value.

The rules here reduce, so that they take two passes, and use old values of their slots behind the reduction. The truth is the
same formula in plain float64, for one parameter at a time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from core.kit import distance, gradients, optimizer_of, parameters, run

from hbcore.api import Domain, Transform, zeros

SHAPES = ((40, 50), (13,), ())
STEPS = 5


@dataclass(frozen=True)
class OneOld(Transform):
    """Two averages, one of the other; the update needs the new fast one and the old slow one, over the new ones' size."""

    name = "one_old"
    domain = Domain.TENSOR

    def slots(self, param):
        return {"fast": zeros(param), "slow": zeros(param)}

    def update(self, u, s, c):
        fast = 0.5 * s["fast"] + u
        slow = 0.75 * s["slow"] + 0.25 * fast
        return (fast + 3 * s["slow"]) / (1 + c.norm(fast - slow)), {"fast": fast, "slow": slow}


@dataclass(frozen=True)
class BothOld(OneOld):
    """The same, but the update is made of both old averages and nothing else."""

    name = "both_old"

    def update(self, u, s, c):
        fast = 0.5 * s["fast"] + u
        slow = 0.75 * s["slow"] + 0.25 * fast
        return (s["fast"] - 3 * s["slow"]) / (1 + c.norm(fast - slow)), {"fast": fast, "slow": slow}


def plainly(rule, start, steps, lr):
    """The parameter and the two averages after ``steps``, in float64."""
    p = start.detach().double()
    fast, slow = torch.zeros_like(p), torch.zeros_like(p)
    for g in steps:
        old_fast, old_slow = fast, slow
        fast = old_fast / 2 + g.double()
        slow = (3 * old_slow + fast) / 4
        direction = fast + 3 * old_slow if rule is OneOld else old_fast - 3 * old_slow
        p = p - lr * direction / (1 + (fast - slow).square().sum().sqrt())
    return p, fast, slow


@pytest.mark.parametrize(
    ("rule", "backend"),
    [(OneOld, "eager"), (BothOld, "eager"), (OneOld, "inductor"), (OneOld, "cpp"), (OneOld, "triton"), (BothOld, "triton")],
)
def test_an_old_value_that_a_later_pass_reads_is_not_overwritten_before(rule, backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("runs under Triton's interpreter; tests/gpu is for GPUs")
    params, steps = parameters(SHAPES), list(gradients(STEPS, SHAPES))
    truth = [plainly(rule, p, column, 0.3) for p, column in zip(params, zip(*steps, strict=True), strict=True)]
    optimizer = optimizer_of(rule)(params, lr=0.3, compile=backend)
    run(optimizer, params, steps)
    assert (optimizer.report.backend, optimizer.report.reasons) == (backend, [])
    states = [optimizer.state[p] for p in params]
    for ours, exact in zip(
        (params, *([s[n] for s in states] for n in ("fast", "slow"))), zip(*truth, strict=True), strict=True
    ):
        assert distance(ours, exact) < 1e-6
