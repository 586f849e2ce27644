"""Adafactor: against a float64 oracle of the paper in torch's form, and against torch.optim.Adafactor."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from adam.first_order import CAUTIOUS, expected
from core.kit import SHAPES, backward, convnet, copy_gradients, distance, gradients, parameters, run
from reference.adafactor import adafactor
from rounding import drift
from torch import nn

import hbcore
from hb_adam import Adafactor
from hbcore.errors import HyperparameterError, OptionError, ParameterError

STEPS = 30
TOLERANCE = {torch.float64: 1e-12, torch.float32: drift(torch.float32, STEPS)}
PRECISION = {torch.float64: np.float64, torch.float32: np.float32}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

CASES = {
    "defaults": {},
    "settings": {"lr": 0.03, "beta2_decay": -0.5, "eps": (0.1, 0.7), "d": 1.25, "weight_decay": 0.3, "maximize": True},
    "a-rate-that-binds": {"lr": 0.5},
    "warm-up": {"lr": 0.5, "warmup_steps": 20},
    "no-rate": {"lr": 0.0, "weight_decay": 0.3},
    "constant-decay": {"beta2_decay": 0.0},
    "cautious": {**CAUTIOUS, "eps": (1e-2, 1e-3)},
    "eps_add": {"division_backend": "eps_add", "eps": (0.1, 1e-3)},
}


@every_dtype
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_rule_agrees_with_its_oracle(options, dtype):
    params = parameters(dtype=dtype)
    run(Adafactor(params, **options, compile="eager"), params, gradients(STEPS, dtype=dtype))
    spelled = {"division": options["division_backend"]} if "division_backend" in options else {}
    oracle = partial(adafactor, precision=PRECISION[dtype])
    assert distance(params, expected(oracle, options, spelled, dtype=dtype, steps=STEPS)) < TOLERANCE[dtype]


def test_every_setting_is_tried():
    assert set(Adafactor.own) <= {key for options in CASES.values() for key in options}


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # Triton's interpreter divides with NumPy
def test_compiled_lanes_agree_with_the_oracle():
    if not pytest.importorskip("hbcore.engine.backends.triton.device_lib").INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    shapes, options = ((5, 7), (13,)), CASES["settings"]
    params = parameters(shapes)
    optimizer = Adafactor(params, **options, compile="triton")
    run(optimizer, params, gradients(6, shapes))
    assert optimizer.report.backend == "triton" and not optimizer.report.reasons
    assert distance(params, expected(adafactor, options, {}, shapes, torch.float32, 6)) < 1e-6


# --- torch.optim ------------------------------------------------------------------------------------------------------

PARITY = {
    "defaults": {},
    "settings": {"lr": 2**-6, "beta2_decay": -0.6, "eps": (1e-4, 1e-2), "d": 1.5, "weight_decay": 0.125, "maximize": True},
}


@every_dtype
@pytest.mark.parametrize("settings", PARITY.values(), ids=PARITY)
def test_torch_trains_alike_for_100_steps(settings, dtype):
    """With a decay whose ``1 - lr * weight_decay`` torch need not round."""
    their_model, our_model = convnet().to(dtype), convnet().to(dtype)
    theirs = torch.optim.Adafactor(their_model.parameters(), **settings)
    ours = Adafactor(our_model.parameters(), **settings, compile="eager")
    for step in range(100):
        backward(their_model, step)
        copy_gradients(their_model.parameters(), our_model.parameters())
        theirs.step()
        ours.step()
    limit = 1e-12 if dtype == torch.float64 else drift(dtype, 100)
    assert distance(our_model.parameters(), their_model.parameters()) < limit


def test_torch_trains_alike_on_every_shape_and_when_parameters_join_late():
    shapes = (*SHAPES, (3, 1), (1, 4), (2, 1, 3, 2))
    params, theirs = parameters(shapes, torch.float64), parameters(shapes, torch.float64)
    ours, reference = Adafactor(params, compile="eager"), torch.optim.Adafactor(theirs)
    for step, grads in enumerate(gradients(40, shapes, torch.float64)):
        for i, (p, q, g) in enumerate(zip(params, theirs, grads, strict=True)):
            p.grad, q.grad = (g.clone(), g.clone()) if step >= 3 * i and (step + i) % 5 else (None, None)
        ours.step()
        reference.step()
    assert distance(params, theirs) < 1e-12


def test_torchs_checkpoints_load_and_ours_load_there():
    their_model, our_model = convnet(), convnet()
    theirs = torch.optim.Adafactor(their_model.parameters(), lr=0.02, d=1.5)
    ours = Adafactor(our_model.parameters(), compile="eager")
    for step in range(6):
        backward(their_model, step)
        theirs.step()
    our_model.load_state_dict(their_model.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for p, q in zip(our_model.parameters(), their_model.parameters(), strict=True):
        held, wanted = ours.state[p], theirs.state[q]
        assert set(held) == set(wanted) and all(torch.equal(held[k], wanted[k]) for k in wanted)
    back = torch.optim.Adafactor(their_model.parameters())
    back.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch does not copy what it loads
    for step in range(6, 20):
        backward(their_model, step)
        copy_gradients(their_model.parameters(), our_model.parameters())
        back.step()
        ours.step()
    assert distance(our_model.parameters(), their_model.parameters()) < drift(torch.float32, 20)
    assert ours.param_groups[0]["lr"] == 0.02 and ours.param_groups[0]["d"] == 1.5


# --- what it promises besides -----------------------------------------------------------------------------------------


def test_a_matrix_is_remembered_by_its_rows_and_columns():
    p, q, scalar = parameters([(6, 4, 5), (7,), ()])
    optimizer = Adafactor([p, q, scalar], storage_dtype="bfloat16", compile="eager")
    run(optimizer, [p, q, scalar], gradients(2, [(6, 4, 5), (7,), ()]))
    shapes = {name: t.shape for name, t in optimizer.state[p].items()}
    assert shapes == {"step": (), "row_var": (6, 4, 1), "col_var": (6, 1, 5)}
    assert optimizer.state[p]["row_var"].dtype == torch.float32, "small: no codec compresses it"
    assert set(optimizer.state[q]) == set(optimizer.state[scalar]) == {"step", "variance"}
    assert optimizer.state[q]["variance"].dtype == torch.bfloat16


def test_matrices_of_one_shape_run_in_one_stack_and_each_by_itself():
    shapes = [(3, 4)] * 3 + [(2, 3, 4)]
    params = parameters(shapes, torch.float64)
    run(Adafactor(params, compile="eager"), params, gradients(10, shapes, torch.float64))
    assert distance(params, expected(adafactor, {}, {}, shapes, steps=10)) < 1e-12


def test_scheduling_its_numbers_makes_no_new_program():
    params = parameters(dtype=torch.float64)
    optimizer = Adafactor(params, compile="eager")
    [first, *rest] = gradients(STEPS, dtype=torch.float64)
    run(optimizer, params, [first])
    programs = optimizer.report.programs
    for t, grads in enumerate(rest, start=2):
        optimizer.param_groups[0].update(lr=0.01 / t, beta2_decay=-1 / t, d=1 + 1 / t)
        run(optimizer, params, [grads])
    assert optimizer.report.programs == programs
    optimizer.param_groups[0]["eps"] = (0.1, 0.5)  # structure
    run(optimizer, params, [first])
    assert optimizer.report.programs > programs


BAD = [
    ({"lr": -1.0}, r"lr=-1\.0 is outside \[0, inf\)"),
    ({"beta2_decay": 0.1}, r"beta2_decay=0\.1 is outside \(-inf, 0\]"),
    ({"d": 0.5}, r"d=0\.5 is outside \[1, inf\)"),
    ({"eps": (-1e-3, 1e-3)}, r"eps\[0\]=-0\.001 is outside"),
    ({"eps": (None, None)}, r"eps\[1\]=None is outside"),
    ({"eps": (None, float("nan"))}, r"eps\[1\]=nan is outside"),
    ({"eps": 1e-3}, r"eps=0\.001 is not a pair"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[str(o) for o, _ in BAD])
def test_numbers_out_of_bounds_are_refused(options, said):
    with pytest.raises(HyperparameterError, match=said):
        Adafactor([nn.Parameter(torch.ones(2))], **options)


def test_options_that_mean_nothing_here_are_refused():
    for option in ("mars", "palm", "capturable"):
        with pytest.raises(OptionError, match=option):
            Adafactor([nn.Parameter(torch.ones(2, 2))], **{option: True})
    with pytest.raises(ParameterError, match="complex"):
        Adafactor([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


def test_names_and_defaults():
    assert hbcore.get("adafactor") is Adafactor
    [ours] = Adafactor([nn.Parameter(torch.ones(2))]).param_groups
    [theirs] = torch.optim.Adafactor([nn.Parameter(torch.ones(2))]).param_groups
    for key in ("lr", "beta2_decay", "eps", "d", "weight_decay", "maximize"):
        assert ours[key] == theirs[key], key
