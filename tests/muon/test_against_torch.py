"""hb_muon's Muon and torch.optim.Muon: the same training, the same checkpoints, and one error that only torch makes."""

from __future__ import annotations

import pytest
import torch
from core.kit import distance, gradients, parameters, run, values
from rounding import factors

from hb_muon import Muon, MuonAdamW

STEPS = 20
SHAPES = ((32, 32), (16, 48), (48, 16))
SETTINGS = {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.1, "eps": 1e-7}
JORDANS = {"ns_coefficients": "jordan", "consume_grad": False, "compile": "eager"}


def trained(optimizer, params, steps=STEPS, skip=0):
    run(optimizer, params, list(gradients(steps, [p.shape for p in params], params[0].dtype))[skip:])


@pytest.mark.parametrize("cls", [Muon, MuonAdamW], ids=lambda c: c.__name__)
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
def test_both_end_at_the_same_weights(nesterov, adjust_lr_fn, cls):
    settings = {**SETTINGS, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    start, ours, theirs = parameters(SHAPES), parameters(SHAPES), parameters(SHAPES)
    trained(cls(ours, **settings, **JORDANS), ours)
    trained(torch.optim.Muon(theirs, **settings), theirs)
    moved = [[p.detach() - s for p, s in zip(end, start, strict=True)] for end in (ours, theirs)]
    assert distance(*moved) < factors(torch.bfloat16)


def test_training_goes_on_from_a_torch_checkpoint():
    settings = {**SETTINGS, "adjust_lr_fn": "match_rms_adamw"}
    theirs = parameters(SHAPES)
    reference = torch.optim.Muon(theirs, **settings)
    trained(reference, theirs, STEPS // 2)
    halfway = values(theirs)
    ours = [torch.nn.Parameter(p) for p in values(theirs)]
    optimizer = Muon(ours, **{**settings, "lr": 1.0}, **JORDANS)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["lr"] == settings["lr"]
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])
    trained(optimizer, ours, STEPS, STEPS // 2)
    trained(reference, theirs, STEPS, STEPS // 2)
    moved = [[p.detach() - s for p, s in zip(end, halfway, strict=True)] for end in (ours, theirs)]
    assert distance(*moved) < factors(torch.bfloat16)


def test_the_momentum_of_bfloat16_parameters_is_their_gradients_average():
    """torch.optim.Muon normalises in place what, without Nesterov's momentum, is the buffer itself; so nothing is compared."""
    dtype = torch.bfloat16
    params = parameters(SHAPES, dtype)
    optimizer = Muon(params, **{**SETTINGS, "nesterov": False}, **JORDANS)
    wanted = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for grads in gradients(5, SHAPES, dtype):
        run(optimizer, params, [grads])
        wanted = [0.95 * b + 0.05 * g.double() for b, g in zip(wanted, grads, strict=True)]
    assert distance([optimizer.state[p]["momentum_buffer"] for p in params], wanted) < 1e-6
