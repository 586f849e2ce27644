"""What is particular to each rule of one gradient; its formula is tested against an oracle in test_first_order.py."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from adam.first_order import STEPS, expected
from core.kit import distance, gradients, parameters, run, same, values
from reference.adamc import adamc
from reference.suds import suds_adamw
from torch import nn

import hbcore
from hb_adam import ADOPT, Adam, AdamC, AdamW, AdEMAMix, LaProp, Lion, NAdam, RMSprop, SignLaProp, SUDSAdamW, UnscaledAdamW
from hbcore.errors import HyperparameterError, OptionError
from hbcore.rules.moments import momentum_product


@pytest.mark.filterwarnings("ignore:state 'max_exp_avg_sq' of amsgrad:hbcore.errors.StateWarning")
@pytest.mark.parametrize("cls", [Adam, AdamW], ids=lambda c: c.__name__)
def test_turning_amsgrad_on_adds_its_slot_and_touches_no_other(cls):
    params = parameters()
    before = cls(params, compile="eager")
    run(before, params, gradients(4))
    after = cls(params, amsgrad=True, compile="eager")
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for p in params:
        assert same([after.state[p][k] for k in before.state[p]], before.state[p].values())
    run(after, params, gradients(1))
    assert all(torch.equal(after.state[p]["max_exp_avg_sq"], after.state[p]["exp_avg_sq"]) for p in params)
    back = cls(params, compile="eager")
    back.load_state_dict(copy.deepcopy(after.state_dict()))
    assert all(set(back.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params)


def test_the_product_of_momenta_is_that_of_its_factors():
    for beta1 in (0.0, 0.5, 0.9, 0.999, 1 - 1e-9):
        for decay in (0.0, 1e-15, 1e-9, 4e-4, 4e-3, 0.1, 1.0, 40.0, 1e5):
            product = 1.0
            for t in range(1, 101):
                product *= beta1 * (1 - 0.5 * 0.96 ** (t * decay))
                if t > 5 and t % 19:
                    continue
                ours = momentum_product(*(torch.tensor(float(x), dtype=torch.float64) for x in (beta1, decay, t)))
                assert abs(float(ours) - product) < 2e-14, (beta1, decay, t)


def test_adopts_first_gradient_moves_nothing_and_the_second_a_tenth():
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = ADOPT([p], lr=0.125, weight_decay=0.5, eps=0.0, compile="eager")
    run(optimizer, [p], [[torch.tensor([2.0, -4.0, 0.5], dtype=torch.float64)]])
    assert p.tolist() == [1.0, -2.0, 3.0]
    assert optimizer.state[p]["exp_avg_sq"].tolist() == [4.0, 16.0, 0.25] and not optimizer.state[p]["exp_avg"].any()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    run(optimizer, [p], [[torch.tensor([2.0, -4.0, 0.5], dtype=torch.float64)]])
    assert np.allclose(p.detach().numpy(), [1 - 0.0125, -2 + 0.0125, 3 - 0.0125], rtol=1e-15)


def test_adamc_decays_by_the_square_of_a_falling_learning_rate():
    schedule = [0.01 * 0.9**t for t in range(STEPS)]
    params = parameters(dtype=torch.float64)
    optimizer = AdamC(params, lr=0.01, max_lr=0.01, weight_decay=2.0, compile="eager")
    for lr, grads in zip(schedule, gradients(STEPS, dtype=torch.float64), strict=True):
        optimizer.param_groups[0]["lr"] = lr
        run(optimizer, params, [grads])
    wanted = expected(adamc, {"lr": schedule, "max_lr": 0.01, "weight_decay": 2.0}, {})
    assert distance(params, wanted) < 1e-12 and optimizer.report.programs == 1


def test_adamc_takes_each_groups_lr_for_its_largest_and_says_so():
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    with pytest.warns(UserWarning, match="pass max_lr"):
        optimizer = AdamC([{"params": [a]}, {"params": [b], "lr": 0.5}, {"params": [c], "max_lr": 3.0}])
    assert [g["max_lr"] for g in optimizer.param_groups] == [0.0025, 0.5, 3.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = AdamC([{"params": [a]}, {"params": [b], "lr": 0.5}], max_lr=2.0)
    assert [g["max_lr"] for g in optimizer.param_groups] == [2.0, 2.0]


def test_a_centered_root_of_a_constant_gradient_is_no_nan():
    p = nn.Parameter(torch.zeros(50))
    optimizer = RMSprop([p], centered=True, alpha=0.5, eps=0.1, compile="eager")
    run(optimizer, [p], [[torch.linspace(-3, 3, 50)]] * 60)
    assert p.isfinite().all()


def test_signlaprop_moves_every_element_alike_and_as_far_as_laprop():
    ours, theirs = parameters([(6, 7)]), parameters([(6, 7)])
    [start] = values(ours)
    for cls, params in ((SignLaProp, ours), (LaProp, theirs)):
        run(cls(params, lr=1.0, compile="eager"), params, gradients(1, [(6, 7)]))
    moved, reference = ours[0] - start, theirs[0] - start
    assert torch.allclose(moved.norm(), reference.norm()) and torch.equal(moved.sign(), reference.sign())
    assert torch.allclose(moved.abs()[moved != 0], moved.abs().amax())


def test_suds_waits_for_a_gradient_that_has_a_direction():
    shapes, zero = [(4, 3)], torch.zeros(4, 3, dtype=torch.float64)
    params = parameters(shapes, torch.float64)
    [start] = values(params)
    steps = [[zero], [zero], *gradients(6, shapes, torch.float64)]
    optimizer = SUDSAdamW(params, compile="eager")
    run(optimizer, params, steps)
    wanted = suds_adamw(start.numpy(), [g.numpy() for [g] in steps])
    assert distance(params, [torch.tensor(wanted)]) < 1e-12
    assert torch.allclose(optimizer.state[params[0]]["fisher_approx"].norm(), torch.ones((), dtype=torch.float64))


def test_suds_treats_each_tensor_of_a_stack_by_itself():
    shapes = [(3, 4)] * 3
    together = parameters(shapes, torch.float64)
    run(SUDSAdamW(together, compile="eager"), together, gradients(10, shapes, torch.float64))
    assert distance(together, expected(suds_adamw, {}, {}, shapes, steps=10)) < 1e-12


SCHEDULED = {
    Adam: {"betas": (0.8, 0.95), "eps": 1e-3},
    NAdam: {"betas": (0.8, 0.95), "momentum_decay": 0.01},
    RMSprop: {"alpha": 0.8, "momentum": 0.5},
    AdEMAMix: {"betas": (0.8, 0.95, 0.99), "alpha": 5.0},
    AdamC: {"max_lr": 0.1, "weight_decay": 0.2},
    Lion: {"betas": (0.8, 0.95)},
}


@pytest.mark.filterwarnings("ignore:AdamC. max_lr:UserWarning")
@pytest.mark.parametrize("cls", SCHEDULED, ids=lambda c: c.__name__)
def test_scheduling_a_number_compiles_nothing(cls):
    params, changed = parameters(), parameters()
    ours, reference = cls(params, compile="eager"), cls(changed, **SCHEDULED[cls], compile="eager")
    ours.param_groups[0].update(SCHEDULED[cls])
    for optimizer, ps in ((ours, params), (reference, changed)):
        run(optimizer, ps, gradients(3))
    assert same(params, changed)
    ours.param_groups[0]["lr"] = 0.5
    run(ours, params, gradients(1))
    assert ours.report.programs == 1


BAD = [
    (Adam, {"betas": (0.9, 1.0)}, r"betas\[1\]=1\.0 is outside \[0, 1\)"),
    (Adam, {"eps": -1.0}, r"eps=-1\.0 is outside"),
    (AdamW, {"betas": (-0.1, 0.9), "amsgrad": True}, r"betas\[0\]=-0\.1 is outside"),
    (UnscaledAdamW, {"betas": (0.9, 2)}, r"betas\[1\]=2 is outside"),
    (NAdam, {"momentum_decay": -0.1}, r"momentum_decay=-0\.1 is outside"),
    (RMSprop, {"alpha": 1.0}, r"alpha=1\.0 is outside \[0, 1\)"),
    (RMSprop, {"momentum": -0.5}, r"momentum=-0\.5 is outside"),
    (ADOPT, {"betas": (0.9,)}, "is not 2 numbers"),
    (AdEMAMix, {"betas": (0.9, 0.99)}, "is not 3 numbers"),
    (AdEMAMix, {"betas": (0.9, 0.99, 1.0)}, r"betas\[2\]=1\.0 is outside"),
    (AdEMAMix, {"alpha": -1.0}, r"alpha=-1\.0 is outside"),
    (AdEMAMix, {"beta3_warmup": -3}, r"beta3_warmup=-3 is outside"),
    (AdamC, {"max_lr": 0.0}, r"max_lr=0\.0 is outside \(0, inf\)"),
    (LaProp, {"betas": (0.9, float("nan"))}, r"betas\[1\]=nan is outside"),
    (SUDSAdamW, {"precond_lr": -1.0}, r"precond_lr=-1\.0 is outside"),
    (Lion, {"lr": -1.0}, r"lr=-1\.0 is outside"),
]


@pytest.mark.parametrize(("cls", "options", "said"), BAD, ids=lambda x: getattr(x, "__name__", None))
def test_numbers_out_of_bounds_are_refused(cls, options, said):
    with pytest.raises(HyperparameterError, match=said):
        cls([nn.Parameter(torch.ones(2))], **options)


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(OptionError, match="couples it"):
        NAdam([nn.Parameter(torch.ones(2))], cautious_weight_decay=True)
    with pytest.raises(OptionError, match="mars corrects by the momentum"):
        RMSprop([nn.Parameter(torch.ones(2))], mars=True)


DEFAULTS = {
    Adam: {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": False},
    UnscaledAdamW: {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-8},
    NAdam: {"lr": 0.002, "betas": (0.9, 0.999), "eps": 1e-8, "momentum_decay": 0.004, "decoupled_weight_decay": False},
    RMSprop: {"lr": 0.0025, "alpha": 0.99, "eps": 1e-6, "debias": True, "centered": False, "momentum": 0.0},
    ADOPT: {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-8},
    AdEMAMix: {"lr": 0.001, "betas": (0.9, 0.999, 0.9999), "alpha": 2.0, "beta3_warmup": None, "alpha_warmup": None},
    AdamC: {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-8, "max_lr": 0.0025},
    LaProp: {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-8},
    SignLaProp: {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-8},
    SUDSAdamW: {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-8, "precond_lr": 0.01},
    Lion: {"lr": 1e-4, "betas": (0.9, 0.99)},
}
FOREACH = [NAdam, AdEMAMix, AdamC, RMSprop, ADOPT, LaProp, SignLaProp]


@pytest.mark.filterwarnings("ignore:AdamC. max_lr:UserWarning", "ignore:Foreach.* is another name:FutureWarning")
@pytest.mark.parametrize("cls", DEFAULTS, ids=lambda c: c.__name__)
def test_names_and_defaults(cls):
    assert hbcore.get(cls.__name__) is cls
    assert cls not in FOREACH or hbcore.get(f"Foreach{cls.__name__}") is cls
    [group] = cls([nn.Parameter(torch.ones(2))]).param_groups
    assert {key: group[key] for key in DEFAULTS[cls]} == DEFAULTS[cls]
    assert group["weight_decay"] == 0.0 and group["warmup_steps"] == 0
