"""The rules of one gradient: against float64 oracles written from the papers, and against torch.optim."""

from __future__ import annotations

import pytest
import torch
from adam.first_order import CASES, STEPS, expected
from core.kit import backward, combined, copy_gradients, distance, gradients, mlp, parameters, run
from rounding import drift, unit

from hb_adam import Adam, AdamW, NAdam, RMSprop, SUDSAdamW

TOLERANCE = {torch.float64: 1e-12, torch.float32: drift(torch.float32, STEPS)}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_case = pytest.mark.parametrize(("cls", "oracle", "options", "spelled"), CASES.values(), ids=CASES)
RULES = ("unscaled", "nadam", "rmsprop", "adopt", "ademamix", "adamc", "sign", "lion")
COMPILED = {name: CASES[name] for name in ("adam-amsgrad", *(f"{rule}-settings" for rule in RULES))}


@every_dtype
@every_case
def test_a_rule_agrees_with_its_oracle(cls, oracle, options, spelled, dtype):
    params = parameters(dtype=dtype)
    optimizer = cls(params, **options, compile="eager")
    run(optimizer, params, gradients(STEPS, dtype=dtype))
    assert distance(params, expected(oracle, options, spelled, dtype=dtype)) < TOLERANCE[dtype]
    if cls is not SUDSAdamW:  # a matrix rule has a segment before it and one after it
        assert optimizer.report.programs == 1 and not optimizer.report.reasons


def test_every_class_and_every_setting_has_an_oracle():
    tried = {(case[0], key) for case in CASES.values() for key in case[2]}
    for cls in {case[0] for case in CASES.values()}:
        assert not {(cls, key) for key in cls.own if key != "lr"} - tried, cls


@every_dtype
@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # Triton's interpreter divides with NumPy
@pytest.mark.parametrize(("cls", "oracle", "options", "spelled"), COMPILED.values(), ids=COMPILED)
def test_triton_agrees_with_the_oracle(cls, oracle, options, spelled, dtype):
    helpers = pytest.importorskip("hbcore.engine.backends.triton.device_lib")
    if not helpers.INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    compiled("triton", cls, oracle, options, spelled, dtype)


@pytest.mark.parametrize(
    ("backend", "case"),
    combined(["inductor"], COMPILED),
)
def test_inductor_agrees_with_the_oracle(backend, case):
    compiled(backend, *COMPILED[case], torch.float32)


def compiled(backend, cls, oracle, options, spelled, dtype):
    """Six steps with ``backend`` end where the oracle ends, in one program."""
    shapes = ((5, 7),)
    params = parameters(shapes, dtype)
    optimizer = cls(params, **options, compile=backend)
    run(optimizer, params, gradients(6, shapes, dtype))
    assert optimizer.report.backend == backend and not optimizer.report.reasons
    assert optimizer.report.programs == 1
    assert distance(params, expected(oracle, options, spelled, shapes, dtype, 6)) < TOLERANCE[dtype]


# --- torch.optim ------------------------------------------------------------------------------------------------------

PARITY = {
    "adam": (torch.optim.Adam, Adam, {"betas": (0.8, 0.99), "weight_decay": 0.1}),
    "adam-amsgrad": (torch.optim.Adam, Adam, {"betas": (0.8, 0.9), "amsgrad": True, "eps": 1e-4}),
    "adamw-amsgrad": (torch.optim.AdamW, AdamW, {"betas": (0.8, 0.9), "amsgrad": True, "weight_decay": 0.125}),
    "nadam": (torch.optim.NAdam, NAdam, {"betas": (0.9, 0.99), "weight_decay": 0.1}),
    "nadam-decoupled": (torch.optim.NAdam, NAdam, {"weight_decay": 0.125, "decoupled_weight_decay": True}),
    "nadam-decay": (torch.optim.NAdam, NAdam, {"momentum_decay": 0.2, "betas": (0.99, 0.99)}),
    "rmsprop": (torch.optim.RMSprop, RMSprop, {"alpha": 0.9, "weight_decay": 0.1, "eps": 1e-3}),
    "rmsprop-momentum": (torch.optim.RMSprop, RMSprop, {"alpha": 0.95, "momentum": 0.8, "eps": 1e-3}),
    "rmsprop-centered": (torch.optim.RMSprop, RMSprop, {"centered": True, "momentum": 0.5, "eps": 0.01}),
}
RMS = {"debias": False, "decoupled_weight_decay": False}


@every_dtype
@pytest.mark.parametrize(("their_cls", "our_cls", "settings"), PARITY.values(), ids=PARITY)
def test_torch_trains_alike_for_100_steps(their_cls, our_cls, settings, dtype):
    """With a decay whose ``1 - lr * weight_decay`` torch need not round."""
    their_model, our_model = mlp(dtype=dtype), mlp(dtype=dtype)
    theirs = their_cls(their_model.parameters(), lr=2**-9, **settings)
    own = {**(RMS if our_cls is RMSprop else {}), "division_backend": "eps_add", "compile": "eager"}
    ours = our_cls(our_model.parameters(), lr=2**-9, **settings, **own)
    for step in range(100):
        backward(their_model, step)
        copy_gradients(their_model.parameters(), our_model.parameters())
        theirs.step()
        ours.step()
    limit = drift(dtype, 100)
    if our_cls is NAdam:  # torch keeps the product of momenta in float32; it counts in a path of a tenth of the weights' norm
        limit = max(limit, 0.1 * unit(torch.float32))
    assert distance(our_model.parameters(), their_model.parameters()) < limit


@pytest.mark.parametrize("cls", [NAdam, Adam, RMSprop], ids=lambda c: c.__name__)
def test_torch_trains_alike_when_parameters_join_late(cls):
    """Every parameter has its own count of steps, and NAdam its own product of momenta."""
    params, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    ours = cls(params, **(RMS if cls is RMSprop else {}), division_backend="eps_add", lr=0.01, compile="eager")
    settings = {k: v for k, v in ours.defaults.items() if k in ("lr", "betas", "eps")}
    reference = getattr(torch.optim, cls.__name__)(theirs, **settings)
    for step, grads in enumerate(gradients(30, dtype=torch.float64)):
        for i, (p, q, g) in enumerate(zip(params, theirs, grads, strict=True)):
            p.grad, q.grad = (g.clone(), g.clone()) if step >= 4 * i and (step + i) % 5 else (None, None)
        ours.step()
        reference.step()
    assert distance(params, theirs) < (1e-9 if cls is NAdam else 1e-12)  # torch keeps that product in float32


def test_amsgrad_loads_and_saves_torchs_checkpoints():
    their_model, our_model = mlp(), mlp()
    theirs = torch.optim.AdamW(their_model.parameters(), lr=0.01, betas=(0.8, 0.9), amsgrad=True)
    ours = AdamW(our_model.parameters(), amsgrad=True, division_backend="eps_add", compile="eager")
    for step in range(6):
        backward(their_model, step)
        theirs.step()
    our_model.load_state_dict(their_model.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for step in range(6, 20):
        backward(their_model, step)
        copy_gradients(their_model.parameters(), our_model.parameters())
        theirs.step()
        ours.step()
    assert distance(our_model.parameters(), their_model.parameters()) < drift(torch.float32, 20)
