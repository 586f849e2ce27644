"""PSGDLRA against its float64 oracle, over parameters end to end, and what its options do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core.kit import gradients, parameters, run
from reference.clipping import trust_region
from reference.psgd_lra import psgd_lra

from hb_psgd import PSGDLRA
from hb_psgd.lra_rule import default_rank
from hbcore.rules.noise import noise_key
from hbcore.rules.noise import normal as normal_bits

SHAPES = ((5, 7), (13,), (2, 3, 4), (1,), ())
STEPS = 24


def drawn(call, step, shapes, rest=()):
    """The engine's numbers for the parameters end to end: those of each one's key, by an element's place."""
    numbers = []
    for i, shape in enumerate(shapes):
        key = noise_key(f"0/0.{i}/0.0", f"psgd_lra.{call}", step)
        count = int(np.prod([*shape, *rest]))
        numbers.append(normal_bits(torch.tensor([key]), count, torch.device("cpu")).double().numpy().reshape(-1, *rest))
    return np.concatenate(numbers)


class Draws:
    """What the oracle draws, in the order in which the rule does: U, V and v at the first step, and then a v each."""

    def __init__(self, shapes, refresh=lambda t: True):
        self.shapes = shapes
        fits = [t for t in range(1, STEPS + 1) if refresh(t)]
        self.calls = [(1, 1), (2, 1), *((3 if t == 1 else 1, t) for t in fits)]

    def __call__(self, shape):
        return drawn(*self.calls.pop(0), self.shapes, shape[1:])


def flat(tensors):
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


def relative(ours, theirs):
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def problem(dtype, steps=STEPS):
    grads = [[g.to(dtype) for g in some] for some in gradients(steps, SHAPES, torch.float64)]
    return parameters(SHAPES, dtype), [some if t != 3 else [g + 0.01 for g in some] for t, some in enumerate(grads)]


def clip(u):
    return trust_region([u], [u])[0]


CASES = {
    "default": {},
    "rank 1": {"rank": 1},
    "delayed": {"delayed": True},
    "no momentum": {"exp_avg_input": False},
    "fitted to the gradient": {"momentum_into_precond_update": False},
    "numbers": {"beta": 0.5, "precond_lr": 0.03, "lower_bound_beta": 0.5, "dampening": 1e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_parameters_end_to_end_equal_the_oracle_of_one_vector(case, dtype):
    options, (params, grads) = CASES[case], problem(dtype)
    start, numel = flat(params), sum(p.numel() for p in params)
    optimizer = PSGDLRA(params, lr=0.01, preconditioner_update_probability=1, **options)
    run(optimizer, params, grads)
    expected, oracle = psgd_lra(
        start, [flat(g) for g in grads], draw=Draws(SHAPES), lr=0.01, clip=clip, **{"rank": default_rank(numel), **options}
    )
    bound = 1e-6 if dtype == torch.float64 else 1e-3
    assert relative(flat(params) - start, expected - start) < bound
    state = [optimizer.state[p] for p in params]
    assert relative(flat(s["d"] for s in state), oracle.d) < bound
    for name, theirs in (("U", oracle.u), ("V", oracle.v)):
        ours = np.concatenate([s[name].double().reshape(-1, theirs.shape[1]).numpy() for s in state])
        assert relative(ours, theirs) < bound
