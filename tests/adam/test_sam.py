"""SAMWrapper: the step of another optimizer with the gradient from the worst point nearby."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from core.kit import loss_of, mlp, same, values
from torch import nn

import hbcore
from hb_adam import SGD, AdamW, SAMWrapper, SFAdamW
from hbcore import HyperparameterError, OptionError


def closure_of(model, optimizer, step, calls=None):
    def closure():
        if calls is not None:
            calls.append(step)
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps):
    return [float(optimizer.step(closure_of(model, optimizer, t)).detach()) for t in steps]


def quadratic(x, a):
    """Loss, gradient of ``sum(a x^4) / 4``, whose gradient at the perturbed point differs in a way that can be written down."""
    return a * x**3


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("maximize", [False, True])
def test_it_is_the_papers(adaptive, maximize):
    start = [np.array([[0.5, -1.0], [2.0, 0.25]]), np.array([1.5, -0.75])]
    scale = [np.array([[1.0, 2.0], [0.5, 3.0]]), np.array([1.0, 4.0])]
    params = [nn.Parameter(torch.tensor(x)) for x in start]
    optimizer = SAMWrapper(params, SGD, ball=0.3, adaptive=adaptive, lr=0.01, beta=0.0, maximize=maximize)

    def closure():
        optimizer.zero_grad()
        loss = sum((torch.tensor(a) * p**4).sum() / 4 for p, a in zip(params, scale, strict=True))
        loss.backward()
        return loss

    x, sign = [s.copy() for s in start], -1 if maximize else 1
    for _ in range(3):
        optimizer.step(closure)
        g = [quadratic(xi, a) for xi, a in zip(x, scale, strict=True)]
        weight = [np.abs(xi) if adaptive else np.ones_like(xi) for xi in x]
        norm = np.sqrt(sum(((w * gi) ** 2).sum() for w, gi in zip(weight, g, strict=True)))
        there = [xi + sign * 0.3 * w**2 * gi / norm for xi, w, gi in zip(x, weight, g, strict=True)]
        x = [xi - sign * 0.01 * quadratic(ti, a) for xi, ti, a in zip(x, there, scale, strict=True)]
    for p, truth in zip(params, x, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), truth, rtol=1e-12)


def test_the_closure_runs_twice_and_the_first_loss_is_returned():
    model, calls = mlp(), []
    optimizer = SAMWrapper(list(model.parameters()))
    before = float(loss_of(model, 0).detach())
    assert float(optimizer.step(closure_of(model, optimizer, 0, calls)).detach()) == before
    assert calls == [0, 0]


def test_with_no_ball_it_is_the_wrapped_optimizer():
    model, alone = mlp(), mlp()
    optimizer, single = SAMWrapper(list(model.parameters()), "AdamW", ball=0.0, lr=0.01), AdamW(alone.parameters(), lr=0.01)
    train(model, optimizer, range(4))
    for t in range(4):
        single.zero_grad()
        loss_of(alone, t).backward()
        single.step()
    assert same(model.parameters(), alone.parameters())


def test_zero_gradients_perturb_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = SAMWrapper([p], SGD, lr=0.1)

    def closure():
        p.grad = torch.zeros(3)
        return torch.zeros(())

    optimizer.step(closure)
    assert torch.equal(p.detach(), torch.ones(3))


def test_an_error_in_the_closure_leaves_the_parameters():
    model = mlp()
    optimizer = SAMWrapper(list(model.parameters()))
    before, good = values(model.parameters()), closure_of(model, optimizer, 0)
    turns = iter([good, lambda: 1 / 0])
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: next(turns)())
    assert same(model.parameters(), before)


def test_an_instance_can_be_wrapped_and_its_groups_have_a_ball():
    model = mlp()
    inner = AdamW([{"params": [p], "ball": 0.01 * i} for i, p in enumerate(model.parameters())])
    optimizer = SAMWrapper(wrapped_optimizer=inner, ball=0.2)
    assert [g["ball"] for g in optimizer.param_groups] == [0.01 * i for i in range(6)]
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert optimizer.param_groups[-1]["ball"] == 0.2
    train(model, optimizer, range(2))


def test_it_resumes_exactly_and_copies():
    model = mlp()
    optimizer = SAMWrapper(list(model.named_parameters()), lr=0.01)
    train(model, optimizer, range(3))
    other = mlp(1)
    other.load_state_dict(model.state_dict())
    resumed = SAMWrapper(list(other.named_parameters()), lr=0.5)
    resumed.load_state_dict(optimizer.state_dict())
    twin_model, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, resumed), (twin_model, twin)):
        train(m, o, range(3, 6))
    assert same(model.parameters(), other.parameters()) and same(model.parameters(), twin_model.parameters())


def test_modes_of_what_it_wraps():
    model = mlp()
    optimizer = SAMWrapper(list(model.parameters()), SFAdamW, lr=0.01)
    train(model, optimizer, range(3))
    before = values(model.parameters())
    optimizer.eval().eval()
    assert not same(model.parameters(), before)
    optimizer.train()
    assert same(model.parameters(), before)


def test_it_learns():
    model = mlp()
    optimizer = hbcore.create("SAMWrapper", model, lr=0.01)
    losses = train(model, optimizer, [0] * 60)
    assert losses[-1] < 0.5 * losses[0]


def test_what_cannot_be_is_refused():
    params = [nn.Parameter(torch.zeros(2))]
    with pytest.raises(HyperparameterError, match="ball=-1 must be a number"):
        SAMWrapper(params, ball=-1)
    with pytest.raises(OptionError, match="not an hbcore optimizer"):
        SAMWrapper(params, torch.optim.SGD)
    with pytest.raises(OptionError, match="pass it alone"):
        SAMWrapper(params, AdamW(params), lr=0.1)
    with pytest.raises(OptionError, match="needs a closure"):
        SAMWrapper(params).step()


def test_a_closure_that_computes_no_gradients_is_an_error():
    """Trainers pass one that does nothing, where their users call backward themselves: nothing would ever move."""
    model = mlp()
    optimizer = SAMWrapper(model.parameters(), lr=0.1)
    before = values(model.parameters())
    loss_of(model, 0).backward()
    with pytest.raises(OptionError, match=r"closure computed no gradients.*calls backward\(\)"):
        optimizer.step(lambda: None)
    assert same(model.parameters(), before)
    assert not optimizer.state
