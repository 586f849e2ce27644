"""``palm=True``: the decay of the second moment rises with the step, 1 - t^-s, and is corrected for no bias."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core.kit import combined, distance, gradients, parameters, run
from rounding import drift

from hb_adam import ADOPT, SGD, AdamW, AdEMAMix, LaProp, Lion, NAdam, RMSprop, SFAdamW, SUDSAdamW
from hb_muon import Muon
from hbcore import HyperparameterError, OptionError
from hbcore.registry import Registry

SHAPES = ((4, 3), (5,), ())


def adam(param, grads, scale, lr=0.0025, b1=0.9, eps=1e-8):
    """Adam with PaLM's second moment, written from the paper: Chowdhery et al. 2022, section 5."""
    m, v, history = np.zeros_like(param), np.zeros_like(param), []
    for t, g in enumerate(grads, 1):
        b2 = 1 - t**-scale
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        param = param - lr * (m / (1 - b1**t)) / np.maximum(np.sqrt(v), eps)
        history.append(param)
    return history


@pytest.mark.parametrize(("backend", "scale"), combined(["eager", "inductor"], [0.8, 0.3, 1.0], compiled=[("inductor", 0.8)]))
def test_adam_with_it_is_the_papers(scale, backend):
    params = parameters(SHAPES, torch.float64)
    start = [p.detach().clone() for p in params]
    steps = list(gradients(12, SHAPES, torch.float64))
    optimizer = AdamW(params, palm=True, beta2_scale=scale, compile=backend)
    run(optimizer, params, steps)
    for i, p in enumerate(params):
        truth = adam(start[i].numpy(), [grads[i].numpy() for grads in steps], scale)[-1]
        np.testing.assert_allclose(p.detach().numpy(), truth, rtol=1e-12, atol=1e-14)


def moved(cls, steps=6, late=False, **options):
    params = parameters(((4, 3), (6, 6)), torch.float64)
    optimizer = cls(params, **options)
    for t, grads in enumerate(gradients(steps, ((4, 3), (6, 6)), torch.float64)):
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            p.grad = None if late and i and t < 2 else g
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("cls", [ADOPT, AdEMAMix, LaProp, NAdam, RMSprop, SFAdamW, SUDSAdamW])
def test_it_changes_every_rule_with_a_second_moment(cls):
    plain, palm = moved(cls), moved(cls, palm=True)
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(palm, plain, strict=True))


@pytest.mark.parametrize("cls", [SUDSAdamW, AdamW])
def test_each_parameter_has_the_decay_of_its_own_step(cls):
    early, late = moved(cls, palm=True), moved(cls, palm=True, late=True)
    assert distance(early[:1], late[:1]) < drift(torch.float64, 6) < 1e-6 < distance(early[1:], late[1:])


def test_the_scale_follows_a_schedule_without_compiling():
    params = parameters(SHAPES, torch.float32)
    optimizer = AdamW(params, palm=True, compile="eager")
    for t, grads in enumerate(gradients(4, SHAPES)):
        optimizer.param_groups[0]["beta2_scale"] = 0.8 + 0.05 * t
        run(optimizer, params, [grads])
    assert optimizer.report.programs == 1


@pytest.mark.parametrize("cls", [SGD, Lion])
def test_a_rule_without_a_second_moment_refuses_it(cls):
    with pytest.raises(OptionError, match="second moment"):
        cls(parameters(SHAPES), palm=True)


def test_muon_has_it_for_what_goes_through_adam():
    shapes, reached = ((6, 4), (5,)), {}
    for palm in (False, True):
        params = parameters(shapes)
        run(Muon(params, palm=palm), params, gradients(4, shapes))
        reached[palm] = [p.detach() for p in params]
    assert torch.equal(reached[True][0], reached[False][0]) and not torch.equal(reached[True][1], reached[False][1])


def test_its_scale_has_bounds():
    with pytest.raises(HyperparameterError, match=r"beta2_scale=1.5 is outside \(0, 1\]"):
        AdamW(parameters(SHAPES), palm=True, beta2_scale=1.5)


def test_the_old_names_of_it():
    for name in ("PaLMForeachSFAdamW", "PaLMSFAdamW"):
        with pytest.warns(FutureWarning):
            optimizer = Registry().get(name)(parameters(SHAPES))  # one that has not warned yet
        assert isinstance(optimizer, SFAdamW) and optimizer.settings.palm
