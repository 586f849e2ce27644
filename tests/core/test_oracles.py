"""Every option, against float64 oracles that were written from the papers and know nothing of hbcore."""

from __future__ import annotations

import pytest
import torch
from core.kit import SHAPES, combined, distance, gradients, parameters, run
from reference.adamw import adamw
from reference.sgd import sgd
from rounding import drift

from hb_adam import SGD, AdamW

STEPS = 25
TOLERANCE = {torch.float64: 1e-12, torch.float32: drift(torch.float32, STEPS)}

# (ours, the oracle's where the spelling differs)
ADAMW = {
    "plain": ({}, {}),
    "betas": ({"betas": (0.7, 0.999), "lr": 0.02}, {}),
    "eps": ({"eps": 0.05}, {}),
    "weight_decay": ({"weight_decay": 0.3}, {}),
    "cautious_weight_decay": ({"weight_decay": 0.3, "cautious_weight_decay": True}, {}),
    "caution": ({"caution": True}, {}),
    "caution-and-decay": ({"caution": True, "weight_decay": 0.3, "cautious_weight_decay": True}, {}),
    "warmup": ({"warmup_steps": 7}, {}),
    "maximize": ({"maximize": True, "caution": True, "weight_decay": 0.3}, {}),
    "eps_add": ({"division_backend": "eps_add", "eps": 0.05}, {"division": "eps_add"}),
    "atan2": ({"division_backend": "atan2"}, {"division": "atan2"}),
    "atan2-scale": ({"division_backend": "atan2", "atan2_scale": 0.5}, {"division": "atan2"}),
    "nan_to_0": ({"division_backend": "nan_to_0"}, {"division": "nan_to_0"}),
    "promote": ({"promote": True}, {}),
}
SGDS = {
    "plain": ({}, {}),
    "no-momentum": ({"momentum": 0.0}, {}),
    "beta": ({"beta": 0.5}, {"momentum": 0.5}),
    "dampening": ({"dampening": 0.4}, {}),
    "nesterov": ({"nesterov": True}, {}),
    "nesterov-dampening": ({"nesterov": True, "dampening": 0.2, "momentum": 0.7}, {}),
    "decoupled": ({"weight_decay": 0.3}, {"decoupled": True}),
    "coupled": ({"weight_decay": 0.3, "decoupled_weight_decay": False}, {"decoupled": False}),
    "cautious_weight_decay": ({"weight_decay": 0.3, "cautious_weight_decay": True}, {}),
    "caution": ({"caution": True}, {}),
    "caution-coupled": ({"caution": True, "weight_decay": 0.3, "decoupled_weight_decay": False}, {"decoupled": False}),
    "warmup": ({"warmup_steps": 7, "maximize": True}, {}),
}
SPELLED_OTHERWISE = {"division_backend", "promote", "beta", "decoupled_weight_decay"}
CASES = [pytest.param(AdamW, adamw, *case, id=f"adamw-{name}") for name, case in ADAMW.items()]
CASES += [pytest.param(SGD, sgd, *case, id=f"sgd-{name}") for name, case in SGDS.items()]


def expected(oracle, options, spelled, shapes=SHAPES, dtype=torch.float64):
    """The oracle's answer for the same start and the same gradients."""
    settings = {k: v for k, v in options.items() if k not in SPELLED_OTHERWISE} | spelled
    columns = zip(*gradients(STEPS, shapes, dtype), strict=True)
    starts = parameters(shapes, dtype)
    return [
        torch.tensor(oracle(p.detach().double().numpy(), [g.double().numpy() for g in column], **settings))
        for p, column in zip(starts, columns, strict=True)
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("cls", "oracle", "options", "spelled"), CASES)
def test_an_option_agrees_with_its_oracle(cls, oracle, options, spelled, dtype):
    params = parameters(dtype=dtype)
    run(cls(params, **options, compile="eager"), params, gradients(STEPS, dtype=dtype))
    assert distance(params, expected(oracle, options, spelled, dtype=dtype)) < TOLERANCE[dtype]


PHASES = {
    "one-phase": {"weight_decay": 0.1},
    "two-phases": {"caution": True, "weight_decay": 0.1, "cautious_weight_decay": True},
}


@pytest.mark.parametrize(
    ("backend", "phases", "dtype"),
    combined(
        ["inductor"],
        PHASES,
        TOLERANCE,
        compiled=[("inductor", "one-phase", torch.float64)],
    ),
    ids=str,
)
def test_inductor_agrees_with_the_oracle(backend, phases, dtype):
    shapes, options = (*SHAPES, (200, 300)), PHASES[phases]
    params = parameters(shapes, dtype)
    optimizer = AdamW(params, **options, compile=backend)
    run(optimizer, params, gradients(STEPS, shapes, dtype))
    assert optimizer.report.backend == "inductor"
    assert distance(params, expected(adamw, options, {}, shapes, dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("agreeing", [0, 1, 2, 50])
def test_caution_scales_up_a_thousandfold_at_most(agreeing):
    """The second gradient points against the momentum of the first, in all but a few of 2000 elements."""
    sign = torch.full((2000,), -0.1, dtype=torch.float64)
    sign[:agreeing] = 1.0
    steps = [[torch.ones(2000, dtype=torch.float64)], [sign]]
    [p] = parameters([(2000,)], torch.float64)
    start = p.detach().clone().numpy()
    run(SGD([p], caution=True, compile="eager"), [p], steps)
    assert distance([p], [torch.tensor(sgd(start, [g.numpy() for [g] in steps], caution=True))]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_take_each_step_in_float32(dtype):
    params = parameters(dtype=dtype)
    before = [p.detach().double() for p in params]
    optimizer = AdamW(params, lr=0.5, compile="eager")
    [grads] = gradients(1, dtype=dtype)
    run(optimizer, params, [grads])
    after = [adamw(p.numpy(), [g.double().numpy()], lr=0.5) for p, g in zip(before, grads, strict=True)]
    assert [p.dtype for p in params] == [dtype] * len(params)
    assert distance(params, [torch.tensor(a).to(dtype) for a in after]) < torch.finfo(dtype).eps
    assert {optimizer.state[p][slot].dtype for p in params for slot in ("exp_avg", "exp_avg_sq")} == {torch.float32}


@pytest.mark.parametrize("backend", ["eager", "cpp", "inductor"])
def test_state_is_stored_in_the_dtype_asked_for(backend):
    shapes = (*SHAPES, *SHAPES)
    starts = [p if i < len(SHAPES) else torch.nn.Parameter(p.detach().double()) for i, p in enumerate(parameters(shapes))]
    params = [torch.nn.Parameter(p.detach().clone()) for p in starts]
    optimizer = AdamW(params, storage_dtype="bfloat16", compile=backend)
    run(optimizer, params, ([g.to(p.dtype) for p, g in zip(params, gs, strict=True)] for gs in gradients(STEPS, shapes)))
    for p in params:
        stored = torch.float64 if p.dtype == torch.float64 else torch.bfloat16
        assert {optimizer.state[p][slot].dtype for slot in ("exp_avg", "exp_avg_sq")} == {stored}
    moved = [p - start for p, start in zip(params, starts, strict=True)]
    exact = [e - start for e, start in zip(expected(adamw, {}, {}, shapes, torch.float32), starts, strict=True)]
    assert distance(moved, exact) < 0.05
    assert distance(moved[: len(SHAPES)], exact[: len(SHAPES)]) > 1e-5  # bfloat16 shows


@pytest.mark.parametrize("division", ["eps_clamp", "eps_add", "atan2", "nan_to_0"])
def test_all_zero_gradients_move_nothing(division):
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, division_backend=division, caution=True, compile="eager")
    run(optimizer, params, [[torch.zeros_like(p) for p in params]] * 3)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
