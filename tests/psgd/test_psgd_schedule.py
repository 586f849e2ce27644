"""When the factors are refreshed."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from psgd.family import factors_of, problem, train
from reference.psgd import refreshes

import hbcore
from hb_psgd import PSGDKron
from hb_psgd.common import update_probability
from hb_psgd.rule import PreconditionByKron
from hbcore.errors import HyperparameterError


def every_third(k):
    return 1.0 if k % 3 == 0 else 0.0


class TestSchedule:
    """preconditioner_update_probability."""

    @pytest.mark.parametrize(("steps", "total"), [(1_000, 1_000), (2_000, 1_631), (5_000, 1_983), (10_000, 2_133)])
    def test_the_default_refreshes_as_often_as_documented(self, steps, total):
        rates = [PreconditionByKron().rate(k) for k in range(1, steps + 1)]
        assert math.floor(math.fsum(rates) + 2**-10) == total
        assert sum(refreshes(update_probability, steps)) == total

    @pytest.mark.parametrize(("given", "rate"), [(0, 0), (0.0, 0), (False, 0), (1, 1), (1.0, 1), (0.25, 0.25)])
    def test_numbers_are_taken_as_they_are(self, given, rate):
        assert {PreconditionByKron(preconditioner_update_probability=given).rate(k) for k in (1, 10, 10**5)} == {rate}

    def test_a_function_is_asked_for_every_step(self):
        t = PreconditionByKron(preconditioner_update_probability=update_probability)
        assert [t.rate(k) for k in (1, 1500, 10**6)] == [update_probability(k) for k in (1, 1500, 10**6)]
        assert pickle.loads(pickle.dumps(t)) == t
        assert PreconditionByKron(preconditioner_update_probability=lambda k: 3).rate(1) == 1

    @pytest.mark.parametrize("given", [-0.1, 1.5, float("nan"), "often"])
    def test_other_values_are_refused(self, given):
        with pytest.raises(HyperparameterError, match=r"preconditioner_update_probability=.*\[0, 1\]"):
            PSGDKron([torch.nn.Parameter(torch.zeros(2))], preconditioner_update_probability=given)

    def test_factors_change_when_due_only(self):
        param, gradients = problem((6, 4))
        seen = []
        for steps in range(1, 9):
            _, state = train(param, gradients[:steps], preconditioner_update_probability=0.25)
            seen.append(torch.cat([q.flatten() for q in factors_of(state)]))
        assert [not torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [i % 4 == 2 for i in range(7)]

    @pytest.mark.parametrize(
        ("probability", "count"), [(0, 0), (0.0, 0), (1, 12), (1.0, 12), (0.25, 3), (every_third, 4), (None, 12)]
    )
    def test_the_engine_refreshes_as_often(self, probability, count):
        p, seen = torch.nn.Parameter(torch.zeros(4, 3)), []
        optimizer = hbcore.get("PSGDKron")([p], preconditioner_update_probability=probability, compile="eager")
        for step in range(13):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(max(step, 1)))  # the first starts the factors
            optimizer.step()
            seen.append(optimizer.state[p]["Q_0"].clone())
        changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
        assert sum(changed) == count, changed
