"""A rule with one number for each row of a matrix is a matrix rule with a slot of that shape, and nothing more."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from core.kit import distance, gradients, parameters, run, same
from distributed.jobs import NormalisedRows

SHAPES = ((5, 7), (13,), (4, 2, 3, 3), ())


def normalised(theta: np.ndarray, grads: list[np.ndarray], lr: float, beta2: float) -> np.ndarray:
    """In float64: row by row of a matrix ``(o, i h w)``; vectors and scalars take the momentum."""
    rows = theta.reshape(theta.shape[0], -1).copy() if theta.ndim > 1 else theta.reshape(1, -1).copy()
    momentum, second = np.zeros_like(rows), np.zeros(len(rows))
    for grad in grads:
        momentum = 0.9 * momentum + grad.reshape(rows.shape)
        step = momentum.copy()
        for i in range(len(rows) if theta.ndim > 1 else 0):
            second[i] = beta2 * second[i] + (1 - beta2) * (momentum[i] ** 2).mean()
            step[i] /= max(np.sqrt(second[i]), 1e-8)
        rows = rows - lr * step
    return rows.reshape(theta.shape)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_every_row_has_its_own_second_moment(backend: str, dtype: torch.dtype, within: float) -> None:
    params, steps = parameters(SHAPES, dtype), list(gradients(6, SHAPES, dtype))
    starts = [p.detach().double().numpy().copy() for p in params]
    optimizer = NormalisedRows(params, lr=0.1, beta2=0.75, compile=backend)
    run(optimizer, params, steps)
    its = [[grads[i].double().numpy() for grads in steps] for i in range(len(params))]
    expected = [torch.from_numpy(normalised(p, g, 0.1, 0.75)) for p, g in zip(starts, its, strict=True)]
    assert distance(params, expected) < within
    assert [tuple(optimizer.state[p]["row_sq"].shape) for p in params if "row_sq" in optimizer.state[p]] == [(5,), (4,)]


def test_rows_resume_bit_for_bit() -> None:
    straight, params, steps = parameters(SHAPES), parameters(SHAPES), list(gradients(6, SHAPES))
    run(NormalisedRows(straight), straight, steps)
    optimizer = NormalisedRows(params)
    run(optimizer, params, steps[:3])
    resumed = NormalisedRows(params, beta2=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(resumed, params, steps[3:])
    assert same(params, straight)
