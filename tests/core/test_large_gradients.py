"""One finite gradient whose square overflows: what it does in torch.optim, and nothing becomes NaN."""

from __future__ import annotations

import pytest
import torch
from core.kit import gradients, parameters, run

import hbcore
from hbcore.engine.backends.base import flat

SHAPES = ((6, 5), (5,), (3, 4, 2))
HIT = 2  # the step


def steps(large, count=6):
    for t, grads in enumerate(gradients(count, SHAPES)):
        if t == HIT:
            for g in grads:
                g.view(-1)[3] = large
        yield grads


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("large", [1.9e19, 1e22])
@pytest.mark.parametrize("name", [n for n in hbcore.list_optimizers() if n not in ("SAMWrapper", "SparseAdam")])
def test_nothing_becomes_nan(name, large):
    params = parameters(SHAPES)
    optimizer = hbcore.get(name)(params, lr=0.01, compile="eager")
    run(optimizer, params, steps(large))
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("large", [1.9e19, 1e22])  # whose square overflows; and whose average of squares does
@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("AdamW", torch.optim.AdamW, {"betas": (0.9, 0.99)}),
        ("NAdam", torch.optim.NAdam, {"betas": (0.9, 0.99)}),
    ],
)
def test_it_is_what_torch_does(name, theirs, options, large):
    ours, others = parameters(SHAPES), parameters(SHAPES)
    optimizer = hbcore.get(name)(ours, lr=0.01, compile="eager", weight_decay=0, **options)
    run(optimizer, ours, steps(large))
    run(theirs(others, lr=0.01, weight_decay=0, **options), others, steps(large))
    for a, b in zip(ours, others, strict=True):
        torch.testing.assert_close(flat(a.detach()), flat(b.detach()), rtol=1e-5, atol=1e-6)
