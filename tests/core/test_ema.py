"""``use_ema``: an average of the weights beside the training, which does not see it."""

from __future__ import annotations

import pytest
import torch
from core.kit import distance, gradients, parameters, run, same
from rounding import drift
from torch import nn

from hb_adam import SGD, AdamW, SFAdamW
from hb_muon import Muon
from hbcore import SplitOpt
from hbcore.errors import OptionError, RuleError


def average(history, decay):
    """Polyak and Juditsky: the moving average of the parameters after each step, debiased, in float64."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in history[0]]
    for values in history:
        total = [(1 - decay) * a + decay * p.double() for a, p in zip(total, values, strict=True)]
    return [a / (1 - (1 - decay) ** len(history)) for a in total]


@pytest.mark.parametrize("backend", ["eager", "cpp", "inductor", "triton"])
@pytest.mark.parametrize("cls", [AdamW, SGD, Muon, SFAdamW])
def test_the_average_is_the_oracles_and_training_does_not_see_it(cls, backend):
    if backend != "eager" and cls is not AdamW:
        pytest.skip("one rule is enough")
    params, twins = parameters(), parameters()
    ours = cls(params, lr=0.05, use_ema=True, ema_decay=0.1, compile=backend)
    plain = cls(twins, lr=0.05, compile="eager")
    history = []
    for step in gradients(6):
        run(ours, params, [step])
        run(plain, twins, [step])
        history.append([p.detach().clone() for p in params])
    assert distance(params, twins) < 1e-6
    with ours.ema_weights():
        assert distance(params, average(history, 0.1)) < 1e-6
        with pytest.raises(RuleError, match="ema_weights"):
            ours.step()
    assert all(torch.equal(p, q) for p, q in zip(params, history[-1], strict=True))


def test_groups_do_not_change_its_pace_and_an_empty_one_stops_nothing():
    params, twins = parameters(), parameters()
    one = AdamW(params, use_ema=True, ema_decay=0.2, compile="eager")
    groups = [{"params": []}, {"params": twins[:2]}, {"params": twins[2:3]}, {"params": twins[3:]}]
    many = AdamW(groups, use_ema=True, ema_decay=0.2, compile="eager")
    run(one, params, gradients(4))
    run(many, twins, gradients(4))
    with one.ema_weights(), many.ema_weights():
        assert distance(params, twins) < drift(torch.float32, 4)  # packed otherwise


def test_it_is_saved_and_comes_back():
    params = parameters()
    optimizer = AdamW(params, use_ema=True, ema_decay=0.3, ecc="bf16+16", compile="eager")
    run(optimizer, params, gradients(3))
    other = AdamW([nn.Parameter(p.detach().clone()) for p in params], use_ema=True, ecc="bf16+16", compile="eager")
    other.load_state_dict(optimizer.state_dict())
    with optimizer.ema_weights(), other.ema_weights():
        assert distance(params, other.param_groups[0]["params"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [AdamW, Muon])
@pytest.mark.parametrize("ecc", [None, "bf16+16"])
def test_turned_on_as_a_checkpoint_is_resumed_it_begins_with_the_weights_of_then(cls, dtype, ecc):
    params, steps = parameters(dtype=dtype), list(gradients(8, dtype=dtype))
    first = cls(params, lr=0.05, compile="eager", ecc=ecc, ema_decay=0.1)
    run(first, params, steps[:5])
    then = [p.detach().clone() for p in params]
    second = cls(params, lr=0.05, compile="eager", ecc=ecc, use_ema=True)
    second.load_state_dict(first.state_dict())
    history = [then] * 5
    for step in steps[5:]:
        run(second, params, [step])
        history.append([p.detach().clone() for p in params])
    with second.ema_weights():
        assert distance(params, average(history, 0.1)) < {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float64: 1e-4}[dtype]


def test_several_optimizers_as_one_lend_the_averages_of_those_that_keep_one():
    params = parameters()
    specs = [
        {"optimizer": "AdamW", "when": lambda p: p.ndim > 1, "use_ema": True, "ema_decay": 0.2, "compile": "eager"},
        {"optimizer": "SGD", "when": lambda p: p.ndim == 1, "compile": "eager"},
        {"optimizer": "SGD", "use_ema": True, "ema_decay": 0.5, "compile": "eager"},
    ]
    optimizer = SplitOpt(params, specs)
    history = []
    for step in gradients(4):
        run(optimizer, params, [step])
        history.append([p.detach().clone() for p in params])
    slow, fast = average(history, 0.2), average(history, 0.5)
    with optimizer.ema_weights():
        for p, last, a, b in zip(params, history[-1], slow, fast, strict=True):
            assert distance([p], [a if p.ndim > 1 else last if p.ndim == 1 else b]) < 1e-6
    assert same(params, history[-1])


def test_without_it_there_are_no_averages_to_have():
    with pytest.raises(OptionError, match="use_ema=True"), AdamW(parameters()).ema_weights():
        pass
