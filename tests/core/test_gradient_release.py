"""hook_into_backward: parameters step inside backward, as ``step()`` would step them, and gradients go as they come."""

from __future__ import annotations

import copy

import pytest
import torch
from core.kit import distance, loss_of, mlp, same, values
from rounding import drift
from torch import nn

from hb_adam import SGD, AdamW, SAMWrapper, SFAdamW
from hb_muon import Muon
from hb_psgd import PSGDKron
from hb_soap import SOAP
from hbcore import OptionError, ParameterError, RuleError, SplitOpt, hook_into_backward

OPTIMIZERS = {
    "adamw": lambda m: AdamW(m.named_parameters(), lr=0.02, warmup_steps=3, weight_decay=0.1, caution=True, mars=True),
    "muon": lambda m: Muon(m.named_parameters(), lr=0.02),
    "soap": lambda m: SOAP(m.named_parameters(), lr=0.02, precondition_frequency=2),
    "psgd": lambda m: PSGDKron(m.named_parameters(), lr=0.02),
    "schedule_free": lambda m: SFAdamW(m.named_parameters(), lr=0.02, warmup_steps=2),
    "stochastic": lambda m: AdamW(m.named_parameters(), lr=0.02, ecc="bf16+8", stochastic_rounding=True),
    "two": lambda m: SplitOpt(
        m.named_parameters(), [{"optimizer": "Muon", "when": lambda p: p.ndim > 1, "lr": 0.05}, {"optimizer": "SGD", "lr": 0.1}]
    ),
}


def pull(model, step):
    """A loss whose gradients do not depend on the weights, so that rounding cannot make two trainings drift apart."""
    generator = torch.Generator().manual_seed(step)
    return sum((p * torch.randn(p.shape, generator=generator)).sum() for p in model.parameters())


def train(model, optimizer, steps, scheduler=None, loss=pull):
    for t in steps:
        loss(model, t).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("part", ["all", "some", "unfrozen later"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_same_as_step(name, part):
    """However many of a group's parameters are hooked, the group counts once a step."""
    model, plain = mlp(), mlp()
    late = [m[0].weight for m in (model, plain)] if part == "unfrozen later" else []
    for p in late:
        p.requires_grad_(False)
    optimizer, usual = OPTIMIZERS[name](model), OPTIMIZERS[name](plain)
    hook_into_backward(list(model.parameters())[1:] if part == "some" else model, optimizer)
    for steps in (range(3), range(3, 7)):
        train(model, optimizer, steps)
        train(plain, usual, steps)
        for p in late:
            p.requires_grad_(True).grad = None
        assert distance(model.parameters(), plain.parameters()) < drift(torch.float32, 7)
    for p in model.parameters():
        p.grad = None
    ours, theirs = optimizer.state_dict()["param_groups"], usual.state_dict()["param_groups"]
    assert [g["hbcore"] for g in ours] == [g["hbcore"] for g in theirs]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_second_backward_before_the_step_is_an_error(name):
    """As in a trainer that accumulates gradients: it used to step after each backward, silently."""
    model, plain = mlp(), mlp()
    optimizer, usual = OPTIMIZERS[name](model), OPTIMIZERS[name](plain)
    hook_into_backward(model, optimizer)
    pull(model, 0).backward()
    with pytest.raises(RuleError, match=r"parameter '.*cannot be accumulated.*Call optimizer.step\(\) after each backward"):
        pull(model, 1).backward()
    train(plain, usual, [0])
    assert distance(model.parameters(), plain.parameters()) < drift(torch.float32, 1)


@pytest.mark.parametrize("count", [1, 3])
def test_any_number_of_tensors(count):
    def run(hooked):
        params = [nn.Parameter(torch.full((2, 2), 1.0 + i)) for i in range(count)]
        optimizer = AdamW(params, lr=0.1, warmup_steps=4)
        if hooked:
            hook_into_backward(params, optimizer)
        for _ in range(5):
            sum((p**2).sum() for p in params).backward()
            optimizer.step()
        return params, optimizer

    (ours, optimizer), (theirs, _) = run(True), run(False)
    assert distance(ours, theirs) < drift(torch.float32, 5)  # one by one, and all in one pack
    assert {float(s["step"]) for s in optimizer.state.values()} == {5.0}


def test_gradients_are_gone_after_backward():
    model = mlp()
    hook_into_backward(model, AdamW(model.parameters()))
    before = values(model.parameters())
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_schedulers_work_as_before():
    model, plain = mlp(), mlp()
    pairs = []
    for m in (model, plain):
        optimizer = SGD(m.parameters(), lr=0.1)
        pairs.append((optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))
    hook_into_backward(model, pairs[0][0])
    train(model, pairs[0][0], range(4), scheduler=pairs[0][1], loss=loss_of)
    train(plain, pairs[1][0], range(4), scheduler=pairs[1][1], loss=loss_of)
    assert same(model.parameters(), plain.parameters())  # SGD takes no roots: each operation is rounded alike everywhere


def test_it_resumes_and_ends():
    model, plain = mlp(), mlp()
    optimizer, usual = AdamW(model.named_parameters(), lr=0.02), AdamW(plain.named_parameters(), lr=0.02)
    with hook_into_backward(model, optimizer):
        train(model, optimizer, range(3))
        saved = copy.deepcopy(optimizer.state_dict())  # whose tensors are the state itself
        train(model, optimizer, [9])
        optimizer.load_state_dict(saved)
        train(plain, usual, range(3))
        model.load_state_dict(plain.state_dict())
        train(model, optimizer, [3])
    train(plain, usual, [3])
    train(model, optimizer, [4])
    train(plain, usual, [4])
    assert distance(model.parameters(), plain.parameters()) < drift(torch.float32, 5)


def test_what_cannot_be_is_refused():
    model = mlp()
    with pytest.raises(OptionError, match="needs the whole model"):
        hook_into_backward(model, AdamW(model.parameters(), gradient_clipping="global_l2norm_clip"))
    with pytest.raises(OptionError, match="more than one backward"):
        hook_into_backward(model, SAMWrapper(list(model.parameters())))
    with pytest.raises(OptionError, match="capturable"):
        hook_into_backward(model, AdamW(model.parameters(), capturable=True))
    with pytest.raises(ParameterError, match="none of these parameters"):
        hook_into_backward(mlp(), AdamW(model.parameters()))
    optimizer = SFAdamW(model.parameters())
    hook_into_backward(model, optimizer)
    optimizer.eval()
    with pytest.raises(RuleError, match="evaluation weights"):
        loss_of(model, 0).backward()
