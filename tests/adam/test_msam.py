"""MSAMLaProp against its float64 oracle, and its two sets of weights."""

from __future__ import annotations

import copy

import pytest
import torch
from core.kit import SHAPES, combined, distance, gradients, parameters, run, same, values
from reference.msam import msam_laprop
from rounding import drift
from torch import nn

import hbcore
from hb_adam import LaProp, MSAMLaProp
from hb_adam.msam import MomentumSAM
from hbcore.errors import HyperparameterError, RuleError

STEPS = 25
TOLERANCE = {torch.float64: 1e-12, torch.float32: drift(torch.float32, STEPS)}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# (ours, the oracle's where the spelling differs)
CASES = {
    "plain": ({}, {}),
    "settings": ({"betas": (0.6, 0.95), "eps": 0.05, "warmup_steps": 5, "maximize": True}, {}),
    "sam_step_size": ({"sam_step_size": 2.0}, {}),
    "no-perturbation": ({"sam_step_size": 0.0}, {}),
    "weight_decay": ({"weight_decay": 0.3}, {}),
    "cautious_weight_decay": ({"weight_decay": 0.3, "cautious_weight_decay": True}, {}),
    "caution": ({"caution": True, "weight_decay": 0.3}, {}),
    "eps_add": ({"division_backend": "eps_add", "eps": 0.5}, {"division": "eps_add"}),
}


def expected(shapes, steps, dtype, **settings):
    """The oracle's ``p`` and ``w`` for the same start; None among the gradients for a parameter that sits the step out."""
    start = [p.detach().double().numpy() for p in parameters(shapes, dtype)]
    grads = [[None if g is None else g.double().numpy() for g in gs] for gs in steps]
    found = msam_laprop(start, grads, **settings)
    return tuple([torch.tensor(x) for x in side] for side in found)


def agree(optimizer, params, wanted, tolerance):
    """Both sets of weights are the oracle's."""
    p, w = wanted
    trained = distance(params, p) < tolerance
    optimizer.eval()
    evaluated = distance(params, w) < tolerance
    optimizer.train()
    return trained and evaluated


@every_dtype
@pytest.mark.parametrize("case", CASES)
def test_an_option_agrees_with_the_oracle(case, dtype):
    options, spelled = CASES[case]
    params = parameters(dtype=dtype)
    optimizer = MSAMLaProp(params, lr=0.02, **options, compile="eager")
    run(optimizer, params, gradients(STEPS, dtype=dtype))
    settings = {k: v for k, v in options.items() if k != "division_backend"} | spelled
    assert agree(
        optimizer, params, expected(SHAPES, gradients(STEPS, dtype=dtype), dtype, lr=0.02, **settings), TOLERANCE[dtype]
    )
    assert optimizer.report.programs == 1 and not optimizer.report.reasons


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # Triton's interpreter divides with NumPy
@pytest.mark.parametrize(("backend", "dtype"), combined(["inductor", "triton"], TOLERANCE), ids=str)
def test_compiled_backends_agree_with_the_oracle(backend, dtype):
    if backend == "triton":
        helpers = pytest.importorskip("hbcore.engine.backends.triton.device_lib")
        if not helpers.INTERPRETED:
            pytest.skip("runs under Triton's interpreter")
    params = parameters(dtype=dtype)
    options = {"weight_decay": 0.1, "warmup_steps": 3, "sam_step_size": 0.5}
    optimizer = MSAMLaProp(params, lr=0.02, **options, compile=backend)
    run(optimizer, params, gradients(5, dtype=dtype))
    assert optimizer.report.backend == backend and not optimizer.report.reasons
    assert agree(optimizer, params, expected(SHAPES, gradients(5, dtype=dtype), dtype, lr=0.02, **options), TOLERANCE[dtype])


def test_the_perturbation_of_the_whole_model_has_one_length():
    """Over all groups, whatever runs together."""
    for options in ({}, {"multi_tensor": False}):
        params = parameters(dtype=torch.float64)
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
        optimizer = MSAMLaProp(groups, sam_step_size=0.7, compile="eager", **options)
        run(optimizer, params, gradients(3, dtype=torch.float64))
        before = values(params)
        optimizer.eval()
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)])
        assert abs(float(moved.norm()) - 0.7) < 1e-12


def test_a_parameter_that_sits_steps_out_keeps_its_perturbation():
    steps = [[g if (k + i) % 3 else None for i, g in enumerate(gs)] for k, gs in enumerate(gradients(12, dtype=torch.float64))]
    params = parameters(dtype=torch.float64)
    optimizer = MSAMLaProp(params, lr=0.02, weight_decay=0.1, warmup_steps=4, compile="eager")
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
    wanted = expected(SHAPES, steps, torch.float64, lr=0.02, weight_decay=0.1, warmup_steps=4)
    assert agree(optimizer, params, wanted, 1e-12)


def test_scheduled_numbers_compile_nothing_and_leave_the_weights_in_place():
    """With another step size, and none at all, what was added before is what is taken off."""
    params, plain = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    optimizer = MSAMLaProp(params, lr=0.02, compile="eager")
    reference = LaProp(plain, lr=0.02, eps=1e-6, compile="eager")
    for rho, grads in zip((0.1, 3.0, 0.5, 0.0), gradients(4, dtype=torch.float64), strict=True):
        optimizer.param_groups[0]["sam_step_size"] = rho
        run(optimizer, params, [grads])
        run(reference, plain, [grads])
    assert optimizer.report.programs == 1
    assert distance(params, plain) < 1e-12


def test_it_finds_the_minimum_from_gradients_at_the_perturbed_point():
    """The gradient is that of the parameters as they are in training: on a quadratic both sets converge around it."""
    p = nn.Parameter(torch.full((8,), 5.0))
    optimizer = MSAMLaProp([p], lr=0.05, compile="eager")
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (p - 1).square().sum()).backward()
        optimizer.step()
    optimizer.eval()
    assert float((p.detach() - 1).abs().max()) < 0.1


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}, {"param_ecc": "bf16+8"}, {"storage_dtype": "bfloat16"}], ids=str)
@pytest.mark.filterwarnings("ignore:.*param_ecc:hbcore.errors.StateWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_evaluating_now_and_then_changes_nothing(options, dtype):
    params, twins = parameters(dtype=dtype), parameters(dtype=dtype)
    ours, plain = (MSAMLaProp(ps, lr=0.1, sam_step_size=1.0, compile="eager", **options) for ps in (params, twins))
    for grads in gradients(5, dtype=torch.float32):
        for optimizer, ps in ((ours, params), (plain, twins)):
            run(optimizer, ps, [[g.to(p.dtype) for g, p in zip(grads, ps, strict=True)]])
        trained = values(params)
        ours.eval()
        assert ours.eval() is ours
        assert not same(params, trained)
        with pytest.raises(RuleError, match="train"):
            ours.step()
        ours.train()
        assert same(params, trained)
    assert same(params, twins)


def test_a_resumed_training_goes_on_as_if_nothing_had_happened():
    options = {"lr": 0.02, "warmup_steps": 12, "compile": "eager"}
    params, steps = parameters(), list(gradients(16))
    optimizer = MSAMLaProp(params, **options)
    run(optimizer, params, steps[:6])
    optimizer.eval()
    copies = [nn.Parameter(p) for p in values(params)]
    resumed = MSAMLaProp(copies, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o in (optimizer, resumed):
        o.train()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(params, copies, strict=True))
    for p, c in zip(params, copies, strict=True):
        c.data.copy_(p)  # the swap back of weights that a file brought rounds once
    for o, ps in ((optimizer, params), (resumed, copies)):
        run(o, ps, steps[6:])
    assert same(params, copies)


def test_a_training_checkpoint_is_exact():
    params, steps = parameters(), list(gradients(12))
    optimizer = MSAMLaProp(params, lr=0.02, compile="eager")
    run(optimizer, params, steps[:6])
    copies = [nn.Parameter(p) for p in values(params)]
    resumed = MSAMLaProp(copies, lr=0.02, compile="eager")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, ps in ((optimizer, params), (resumed, copies)):
        run(o, ps, steps[6:])
        o.eval()
    assert same(params, copies)


def test_before_the_first_step_both_sets_are_the_same():
    p = torch.randn(5)
    swapped, changed = MomentumSAM().swap(p, {"perturbation": torch.zeros(5)}, False)
    assert torch.equal(swapped, p) and not changed


def test_gradients_of_zero_perturb_nothing():
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = MSAMLaProp([p], compile="eager")
    for _ in range(3):
        p.grad = torch.zeros(2)
        optimizer.step()
    assert p.tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sam_step_size": -0.1}, r"sam_step_size=-0\.1 is outside \[0, inf\)"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1\.0 is outside \[0, 1\)"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0 is outside"),
    ],
)
def test_numbers_out_of_bounds_are_refused(options, said):
    with pytest.raises(HyperparameterError, match=said):
        MSAMLaProp([nn.Parameter(torch.ones(2))], **options)


def test_its_name_and_defaults():
    assert hbcore.get("MSAMLaProp") is MSAMLaProp
    [group] = MSAMLaProp([nn.Parameter(torch.ones(2))]).param_groups
    wanted = {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0, "sam_step_size": 0.1}
    assert {key: group[key] for key in wanted} == wanted
