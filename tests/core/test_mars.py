"""MARS against a float64 oracle, alone and in front of Adam, on every backend."""

from __future__ import annotations

import pytest
import torch
from core.kit import SHAPES, combined, distance, gradients, parameters, run, same, values
from reference.adamw import adamw
from reference.mars import mars

from hbcore import get
from hbcore.api import Optimizer, ScaleByAdam
from hbcore.errors import HyperparameterError
from hbcore.rules.mars import Mars

STEPS = 12
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
BACKENDS = ("eager", "triton", "cpp", "inductor")


class MarsAdam(Optimizer):
    """Adam's direction on MARS' gradient."""

    def __init__(self, params, lr=0.0025, betas=(0.9, 0.99), eps=1e-8, mars_gamma=0.0025, **options):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "mars_gamma": mars_gamma}, options)

    @staticmethod
    def chain(h):
        return (ScaleByAdam(h.betas, h.eps), Mars(h.mars_gamma, h.betas[0]))  # out of order: the stage decides


class MarsAlone(Optimizer):
    def __init__(self, params, lr=0.1, mars_gamma=0.0025, beta=0.9, **options):
        super().__init__(params, {"lr": lr, "mars_gamma": mars_gamma, "beta": beta}, options)

    @staticmethod
    def chain(h):
        return (Mars(h.mars_gamma, h.beta),)


def columns(dtype=torch.float64):
    """Each parameter's gradients, oldest first."""
    return [[g.double().numpy() for g in column] for column in zip(*gradients(STEPS, dtype=dtype), strict=True)]


def corrected(steps, **settings):
    """The oracle's gradients for every parameter, step by step."""
    made = [list(mars([g.double().numpy() for g in column], **settings)) for column in zip(*steps, strict=True)]
    return list(zip(*made, strict=True))


@pytest.mark.parametrize(("dtype", "backend"), combined(TOLERANCE, BACKENDS), ids=str)
def test_mars_and_the_clip_before_adam_are_the_paper(dtype, backend):
    params = parameters(dtype=dtype)
    wanted = [
        torch.tensor(
            adamw(p.detach().double().numpy(), list(mars(column, gamma=0.025, beta=0.95, clip=True)), betas=(0.95, 0.99))
        )
        for p, column in zip(params, columns(dtype), strict=True)
    ]
    optimizer = MarsAdam(params, betas=(0.95, 0.99), mars_gamma=0.025, compile=backend, gradient_clipping="l2_clip_")
    run(optimizer, params, gradients(STEPS, dtype=dtype))
    assert optimizer.report.backend == backend
    assert distance(params, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("gamma", "beta"), [(0.0, 0.9), (0.0025, 0.9), (0.5, 0.95), (0.1, 0.0)])
def test_the_corrected_gradient_itself(gamma, beta, backend):
    steps = list(gradients(STEPS))
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    optimizer = MarsAlone(params, lr=1.0, mars_gamma=gamma, beta=beta, compile=backend, consume_grad=False)
    for arrived, wanted in zip(steps, corrected(steps, gamma=gamma, beta=beta), strict=True):
        with torch.no_grad():
            for p in params:
                p.zero_()
        run(optimizer, params, [arrived])
        assert distance([-p for p in params], [torch.tensor(c) for c in wanted]) <= 1e-6
        assert same([optimizer.state[p]["mars_prev_grad"] for p in params], arrived)


def test_the_option_is_the_transform():
    params, twins = parameters(), parameters()
    run(MarsAdam(params, mars_gamma=0.1), params, gradients(3))
    run(get("AdamW")(twins, mars=True, mars_gamma=0.1), twins, gradients(3))
    assert same(values(params), values(twins))


def test_the_clip_and_the_correction_both_happen_in_these_gradients():
    """Or else the tests above would not notice if they were missing."""
    steps = list(gradients(STEPS))
    norms = [float(torch.tensor(c).norm()) for step in corrected(steps, gamma=0.0025, clip=True) for c in step]
    assert any(abs(n - 1) < 1e-12 for n in norms) and any(0 < n < 0.9 for n in norms)
    tiny = [[g * 1e-3 for g in step] for step in gradients(2)]
    last = corrected(tiny, gamma=0.5)[1]
    assert distance([torch.tensor(c) for c in last], tiny[1]) > 0.1


def test_the_first_step_is_not_corrected():
    steps = [[g * 1e-3 for g in step] for step in gradients(1)]
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    run(MarsAlone(params, lr=1.0, mars_gamma=10.0), params, steps)
    assert same([-p.detach() for p in params], steps[0])


def test_a_late_parameter_has_a_first_step_of_its_own():
    early, late = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = MarsAlone([early, late], lr=1.0, mars_gamma=10.0)
    early.grad = torch.full((3,), 0.01)
    optimizer.step()
    early.grad, late.grad = torch.full((3,), 0.01), torch.full((3,), 0.02)
    optimizer.step()
    assert torch.equal(late.detach(), torch.full((3,), -0.02))


def test_scheduling_gamma_compiles_nothing_and_counts():
    params = parameters()
    optimizer = MarsAlone(params, mars_gamma=0.0)
    steps = [[g * 1e-3 for g in step] for step in gradients(3)]
    run(optimizer, params, steps[:1])
    programs, before = optimizer.report.programs, values(params)
    optimizer.param_groups[0]["mars_gamma"] = 1.0
    run(optimizer, params, steps[1:2])
    assert optimizer.report.programs == programs
    wanted = [torch.tensor(c) for c in corrected(steps[:2], gamma=1.0)[1]]
    assert distance([(b - p) / 0.1 for b, p in zip(before, params, strict=True)], wanted) <= 1e-3  # differences of rounded p


@pytest.mark.parametrize("wrong", [{"mars_gamma": -0.1}, {"beta": 1.0}])
def test_numbers_out_of_bounds_are_refused(wrong):
    with pytest.raises(HyperparameterError, match=next(iter(wrong))):
        MarsAlone(parameters(), **wrong)
