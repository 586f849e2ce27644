"""Runs of the SOAP family that are saved and resumed at every phase of a schedule, and matrices that take turns."""

from __future__ import annotations

import itertools

import pytest
import torch
from core.kit import resumes

import hbcore

SHAPES = ((6, 6), (6, 6), (5, 7), (4, 3, 2), (9,), ())
SCHEDULES = {
    "every third": {"precondition_frequency": 3},
    "staggered": {"precondition_frequency": 3, "stagger": True},
    "staggered schedule": {"use_precond_schedule": True, "precond_scheduler": (2, 3), "stagger": True},
    "schedule": {"use_precond_schedule": True, "precond_scheduler": (2, 3)},
    "split": {"split": True, "max_precond_dim": 4, "precondition_frequency": 2},
    "eigenvectors": {"solver": "eigh", "precondition_frequency": 2},
}
STEPS = 9


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def run(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["SOAP", *(pytest.param(n, marks=pytest.mark.broad) for n in ("HeavyKLSOAP", "KLShampoo"))])
def test_a_run_resumes_bit_for_bit_at_every_phase(name, schedule):
    options = {"lr": 0.02, **SCHEDULES[schedule]}
    resumes(lambda params: hbcore.get(name)(params, **options), parameters, run, STEPS)


def test_staggered_matrices_refresh_in_other_steps_and_each_as_often():
    params = parameters()
    optimizer = hbcore.get("SOAP")(params, lr=0.02, precondition_frequency=3, stagger=True)
    matrices = [p for p in params if p.ndim > 1]
    turns = [[] for _ in matrices]
    run(optimizer, params, range(1))
    for step in range(1, 13):
        before = [optimizer.state[p]["Q_0"].clone() for p in matrices]
        run(optimizer, params, range(step, step + 1))
        for p, q, steps in zip(matrices, before, turns, strict=True):
            if not torch.equal(optimizer.state[p]["Q_0"], q):
                steps.append(step)
    assert [len(steps) for steps in turns] == [4] * len(matrices)
    assert all(b - a == 3 for steps in turns for a, b in itertools.pairwise(steps))
    assert len({steps[0] for steps in turns}) > 1
