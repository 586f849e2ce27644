"""First gradients of every kind: nothing becomes NaN, and training goes on."""

from __future__ import annotations

import math

import pytest
import torch
from core.kit import normal
from psgd.family import expected, factors_of, finite, problem, relative, train

from hb_psgd.factor_rules import RULES


class TestZeros:
    """A gradient of zeros says nothing about the scale of what is to come."""

    @pytest.mark.parametrize("shape", [(6, 4), (9,), ()], ids=str)
    @pytest.mark.parametrize("options", [{}, {"delayed": True}, {"preconditioner_update_probability": 0.3}], ids=str)
    def test_first_gradients_of_zeros_wait_for_others(self, shape, options):
        param, gradients = problem(shape)
        zeros = [torch.zeros_like(param)] * 3
        still, state = train(param, zeros, **options)
        assert torch.equal(still, param)
        assert all(torch.equal(q, torch.zeros_like(q)) for q in factors_of(state))
        ours, _ = train(param, zeros + gradients, **options)
        spelled = {"probability": lambda k: 0.3} if "preconditioner_update_probability" in options else options
        dense = (True, True) if len(shape) == 2 else (False,)
        assert relative(ours, expected(param, zeros + gradients, dense=dense, **spelled)[0]) < 1e-9

    @pytest.mark.parametrize("shape", [(6, 4), (4, 3, 2, 2), (9,), ()], ids=str)
    def test_zeros_at_any_time_leave_everything_finite(self, shape):
        param, gradients = problem(shape, torch.float32)
        gradients = [g * (i % 4 != 3) for i, g in enumerate(gradients)] + [torch.zeros_like(param)] * 100
        ours, state = train(param, gradients)
        assert finite(ours, *state["psgd_kron", 0].values())

    def test_a_scale_that_is_given_does_not_wait(self):
        param, _ = problem((6, 4))
        _, state = train(param, [torch.zeros_like(param)], precond_init_scale=4.0, preconditioner_update_probability=0)
        for q in factors_of(state):
            assert torch.allclose(q, 2 * torch.eye(len(q), dtype=q.dtype))

    @pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-15, 1e-11, 1e-4, 1e4, 1e8])
    @pytest.mark.parametrize("shape", [(6, 4), (9,), ()], ids=str)
    def test_gradients_of_any_size_leave_everything_finite_in_float32(self, shape, size):
        param, gradients = problem(shape, torch.float32)
        coarse = [(g * size).bfloat16().float() for g in gradients]
        ours, state = train(param, coarse * 3)
        assert finite(ours, *state["psgd_kron", 0].values())

    def test_the_first_update_has_elements_of_size_1(self):
        for size in (1e-7, 1.0, 1e5):
            param = torch.zeros(50, 40, dtype=torch.float64)
            g = torch.randn(param.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * size
            ours, _ = train(param, [g], lr=1.0, preconditioner_update_probability=0)
            assert 0.7 < float((ours / 0.01).square().mean().sqrt()) < 1.3


def test_without_refreshes_a_block_may_start_at_the_steps_1_2_4_8():
    param, [g, *_] = problem((6, 4))
    gradients = [torch.zeros_like(g)] * 4 + [g] * 5
    options = {"preconditioner_update_probability": 0, "exp_avg_input": False}
    moved = [not torch.equal(train(param, gradients[:steps], **options)[0], param) for steps in range(1, 10)]
    assert moved == [False] * 7 + [True] * 2


FIRST = {
    "zero": lambda shape: torch.zeros(shape),
    "1e-30": lambda shape: normal(*shape, dtype=torch.float32) * 1e-30,
    "1e18": lambda shape: normal(*shape, dtype=torch.float32) * 1e18,
    "1e25": lambda shape: normal(*shape, dtype=torch.float32) * 1e25,
    "rank 1": lambda shape: torch.ones(shape),
    "one element": lambda shape: torch.eye(*shape)[:1].expand(shape) * (torch.arange(shape[0])[:, None] == 1),
}


CASES = [(first, rule, {}) for first in FIRST for rule in (RULES if first == "1e25" else ("pro", "eq"))]
CASES += [(first, "pro", {"delayed": True}) for first in FIRST]
CASES += [(first, "pro", {"preconditioner_update_probability": 0.3}) for first in FIRST if first[:3] not in ("1e1", "1e2")]


@pytest.mark.parametrize(("first", "rule", "options"), CASES, ids=str)
def test_training_goes_on_after_any_first_gradient(first, rule, options):
    """The preconditioner comes at least a factor of three closer to where gradients of size 1 have updates of size 1.

    The momentum would feel 1e25 for 500 steps, so the rule is given gradients.
    """
    param, gradients = torch.zeros(6, 4), [FIRST[first]((6, 4)), *normal(80, 6, 4, seed=3, dtype=torch.float32)]
    given = {"precond_rule": rule, "exp_avg_input": False, "rule_probes": None, **options}

    def after(steps):
        moved, state = train(param, gradients[:steps], **given)
        slots = state["psgd_kron", 0]
        assert finite(moved, *slots.values())
        return math.log10(float(slots["P_0"].norm() * slots["P_1"].norm()))

    early, late = after(2), after(81)
    assert abs(late - 1) < max(1, abs(early - 1) - 0.5)


@pytest.mark.parametrize("large", [1e19, 1e22, 1e30])
@pytest.mark.parametrize("rule", RULES)
def test_a_large_gradient_in_between_leaves_the_state_finite(rule, large):
    gradients = normal(12, 6, 4, seed=3, dtype=torch.float32)
    gradients[5, 2, 1] = large
    after, state = train(torch.zeros(6, 4), list(gradients), precond_rule=rule, rule_probes=None)
    assert finite(after, *state["psgd_kron", 0].values())
