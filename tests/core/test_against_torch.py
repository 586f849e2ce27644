"""AdamW and SGD follow torch.optim step for step, in every setting that both have."""

from __future__ import annotations

import copy

import pytest
import torch
from core.kit import backward, convnet, copy_gradients, distance, mlp, train
from rounding import drift, unit

from hb_adam import SGD, AdamW

MODELS = {"mlp": mlp, "convnet": convnet}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def two_groups(model, **second):
    """Matrices in one group; vectors, with settings of their own, in another."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices}, {"params": vectors, **second}]


def follow(theirs, their_model, ours, our_model, steps, between=lambda step: None):
    """Train with torch's optimizer, and hand ours the same gradients."""
    for step in range(steps):
        backward(their_model, step)
        copy_gradients(their_model.parameters(), our_model.parameters())
        theirs.step()
        ours.step()
        between(step)


@pytest.mark.parametrize(
    ("model", "backend", "dtype"),
    [(m, "eager", d) for m in MODELS for d in (torch.float32, torch.float64)] + [("convnet", "inductor", torch.float32)],
    ids=str,
)
def test_adamw_follows_torch_for_200_steps(model, backend, dtype):
    their_model, our_model = MODELS[model]().to(dtype), MODELS[model]().to(dtype)
    settings = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    theirs = torch.optim.AdamW(two_groups(their_model, lr=1e-2, weight_decay=0.0), **settings)
    ours = AdamW(two_groups(our_model, lr=1e-2, weight_decay=0.0), **settings, division_backend="eps_add", compile=backend)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t / 50)) for o in (theirs, ours)]
    follow(theirs, their_model, ours, our_model, 200, lambda step: [s.step() for s in schedules])
    assert distance(our_model.parameters(), their_model.parameters()) < drift(dtype, 200)
    assert ours.report.backend == backend
    for a, b in zip(our_model.parameters(), their_model.parameters(), strict=True):
        for slot in ("exp_avg", "exp_avg_sq"):
            # torch rounds both beta and 1 - beta, whose sum is then not 1; over a moment's memory of 100 steps that adds up
            assert distance([ours.state[a][slot]], [theirs.state[b][slot]]) < 2 * 100 * unit(dtype)
        assert ours.state[a]["step"] == theirs.state[b]["step"] == 200


def test_a_float64_training_of_its_own_ends_where_torch_ends():
    their_model, our_model = mlp(dtype=torch.float64), mlp(dtype=torch.float64)
    train(their_model, torch.optim.AdamW(their_model.parameters(), lr=1e-2, betas=(0.9, 0.99)), range(50))
    train(our_model, AdamW(our_model.parameters(), lr=1e-2, weight_decay=0.01, division_backend="eps_add"), range(50))
    assert distance(our_model.parameters(), their_model.parameters()) < 1e-11


@every_dtype
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True},
    ],
    ids=lambda s: "-".join(s),
)
def test_sgd_follows_torch(settings, maximize, dtype):
    their_model, our_model = mlp(dtype=dtype), mlp(dtype=dtype)
    shared = {"lr": 1e-3, "maximize": maximize, **settings}
    theirs = torch.optim.SGD(two_groups(their_model, lr=5e-3), **shared)
    ours = SGD(two_groups(our_model, lr=5e-3), **shared, decoupled_weight_decay=False)
    steps = 30 if maximize else 100  # ascending, the loss soon overflows
    follow(theirs, their_model, ours, our_model, steps)
    assert distance(our_model.parameters(), their_model.parameters()) < drift(dtype, steps)


@every_dtype
def test_adamw_maximizes_as_torch_does(dtype):
    their_model, our_model = mlp(dtype=dtype), mlp(dtype=dtype)
    theirs = torch.optim.AdamW(two_groups(their_model, maximize=False), lr=1e-3, betas=(0.9, 0.99), maximize=True)
    ours = AdamW(two_groups(our_model, maximize=False), lr=1e-3, weight_decay=0.01, maximize=True, division_backend="eps_add")
    follow(theirs, their_model, ours, our_model, 30)
    assert distance(our_model.parameters(), their_model.parameters()) < drift(dtype, 30)


def coupled_sgd(params, **settings):
    return SGD(params, **settings, decoupled_weight_decay=False)


def torchs_adamw(params, **settings):
    return AdamW(params, **settings, division_backend="eps_add")


@every_dtype
@pytest.mark.parametrize("saved_by", ["torch", "hbcore"])
@pytest.mark.parametrize(
    ("their_cls", "our_cls", "settings"),
    [
        (torch.optim.AdamW, torchs_adamw, {"betas": (0.8, 0.95), "weight_decay": 0.1}),
        (torch.optim.SGD, coupled_sgd, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.SGD, coupled_sgd, {"momentum": 0.9, "dampening": 0.5}),
        (torch.optim.SGD, coupled_sgd, {"momentum": 0.0}),
    ],
    ids=["adamw", "sgd", "sgd-dampening", "sgd-plain"],
)
def test_checkpoints_cross_over_and_both_continue_equally(their_cls, our_cls, settings, saved_by, dtype):
    their_model, our_model = mlp(dtype=dtype), mlp(dtype=dtype)
    theirs = their_cls(their_model.parameters(), lr=1e-2, **settings)
    ours = our_cls(our_model.parameters(), lr=1e-2, **settings)
    source, source_model, target, target_model = (
        (theirs, their_model, ours, our_model) if saved_by == "torch" else (ours, our_model, theirs, their_model)
    )
    train(source_model, source, range(5))
    target_model.load_state_dict(source_model.state_dict())
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    follow(theirs, their_model, ours, our_model, 20)
    assert distance(our_model.parameters(), their_model.parameters()) < drift(dtype, 20)


def test_a_momentum_buffer_of_none_counts_as_absent():
    """torch.optim.SGD saved ``None`` before its first step with momentum."""
    model = mlp()
    optimizer = SGD(model.parameters())
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["hbcore"]
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(list(model.parameters())))}
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(2))
    assert all(torch.isfinite(p).all() for p in model.parameters())
