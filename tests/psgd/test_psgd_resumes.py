"""Runs of the PSGD family that are saved and resumed at every phase of a schedule, and one parameter at a time."""

from __future__ import annotations

import pytest
import torch
from core.kit import resumes

import hbcore

SHAPES = ((6, 6), (6, 6), (5, 7), (4, 3, 2), (9,), ())
STEPS = 7


def falling(k):
    return max(0.2, 0.7**k)


SCHEDULES = {
    "every step": {},
    "every third": {"preconditioner_update_probability": 1 / 3},
    "falling": {"preconditioner_update_probability": falling},
    "delayed": {"preconditioner_update_probability": 0.4, "delayed": True},
    "averages": {"preconditioner_update_probability": 0.4, "precond_grad_accum": True},
    "gradients": {"preconditioner_update_probability": 0.4, "momentum_into_precond_update": False},
    "not cached": {"preconditioner_update_probability": 0.4, "cached": False},
    "split": {"split": True, "max_size_triangular": 4, "preconditioner_update_probability": 0.4},
    "bfloat16": {"q_dtype": torch.bfloat16, "preconditioner_update_probability": 0.4},
    "eq": {"precond_rule": "eq", "preconditioner_update_probability": 0.4},
}
QUICK = [("PSGDKron", "falling"), ("PSGDKron", "averages"), ("LATHER", "falling")]
MORE = [("PSGDKron", schedule) for schedule in SCHEDULES]
MORE += [("QSGD", "falling"), ("LATHER", "averages"), ("LATHER", "split")]
CASES = [pytest.param(*c, marks=() if c in QUICK else pytest.mark.broad) for c in dict.fromkeys((*QUICK, *MORE))]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def run(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator) * (step + i > 1)  # some start later
        optimizer.step()


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_a_run_resumes_bit_for_bit_at_every_phase(name, schedule):
    options = {"lr": 0.02, "compile": "eager", **SCHEDULES[schedule]}
    resumes(lambda params: hbcore.get(name)(params, **options), parameters, run, STEPS)


@pytest.mark.parametrize(("name", "schedule"), CASES)
def test_one_parameter_at_a_time_gives_the_same(name, schedule):
    results = []
    for together in (True, False):
        params = parameters()
        run(
            hbcore.get(name)(params, lr=0.02, compile="eager", multi_tensor=together, **SCHEDULES[schedule]),
            params,
            range(STEPS),
        )
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
