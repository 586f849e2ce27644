"""Chains of several matrix rules, with elementwise rules before, between and behind them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from core.kit import distance, gradients, optimizer_of, parameters, run

from hbcore.api import Domain, Transform, ema, matrix_view, zeros

SHAPES = ((4, 3), (5, 2), (4, 3), (3, 3))


@dataclass(frozen=True)
class Smooth(Transform):
    """An average, elementwise: what runs between two matrix rules."""

    name = "smooth"

    def slots(self, param):
        return {"smooth": zeros(param)}

    def update(self, u, s, c):
        new = ema(s["smooth"], u, 0.5)
        return new, {"smooth": new}


@dataclass(frozen=True)
class Rows(Transform):
    """Adds to each element the mean of its column, and remembers what it saw."""

    name = "rows"
    domain = Domain.MATRIX

    def blocks(self, shape):
        return matrix_view(shape)

    def slots(self, param):
        return {"by_rows": zeros(param)}

    def update(self, u, s, c):
        return u + u.mean(-2, keepdim=True), {"by_rows": s["by_rows"] + u}


@dataclass(frozen=True)
class Columns(Rows):
    """Takes from each element twice the mean of its row, and remembers what it saw."""

    name = "columns"

    def slots(self, param):
        return {"by_columns": zeros(param)}

    def update(self, u, s, c):
        return u - 2 * u.mean(-1, keepdim=True), {"by_columns": s["by_columns"] + u}


def plainly(start, steps, lr):
    """The parameter and what the rules remember, in float64."""
    p = start.detach().double()
    smooth, by_rows, by_columns = (torch.zeros_like(p) for _ in range(3))
    for g in steps:
        u = g.double()
        by_rows = by_rows + u
        u = u + u.mean(0)
        smooth = u = (smooth + u) / 2
        by_columns = by_columns + u
        u = u - 2 * u.mean(1, keepdim=True)
        p = p - lr * u
    return {"param": p, "smooth": smooth, "by_rows": by_rows, "by_columns": by_columns}


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_each_matrix_rule_of_a_chain_receives_what_the_rule_before_it_returned(backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("runs under Triton's interpreter; tests/gpu is for GPUs")
    params, steps = parameters(SHAPES), list(gradients(4, SHAPES))
    columns = zip(*steps, strict=True)
    truth = [plainly(p, column, 0.1) for p, column in zip(params, columns, strict=True)]
    optimizer = optimizer_of(Rows, Smooth, Columns)(params, lr=0.1, compile=backend)
    run(optimizer, params, steps)
    assert (optimizer.report.backend, optimizer.report.reasons) == (backend, [])
    for p, exact in zip(params, truth, strict=True):
        ours = {"param": p, **optimizer.state[p]}
        assert distance([ours[name] for name in exact], exact.values()) < 1e-6
