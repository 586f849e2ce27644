"""NorMuon against a float64 oracle written from the paper, and in the conformance kit, with two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hb_normuon import NorMuon
from hbcore.testing import RANK_CHECKS, Case, conformance

Array = NDArray[np.float64]

SHAPES = ((5, 7), (8, 3), (8, 3), (13,), ())
STEPS = 10


OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": 0.1, "betas": (0.8, 0.5), "adam_betas": (0.5, 0.9), "weight_decay": 0.1},
]


def oracle(
    x: Array,
    grads: list[Array],
    lr: float,
    betas: tuple[float, float] = (0.95, 0.95),
    adam_betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
) -> Array:
    """Algorithm 1 of arXiv:2510.05491 with the exact orthogonal factor, and Adam for what is no matrix."""
    (b1, b2), m, v = betas if x.ndim == 2 else adam_betas, np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        if x.ndim == 2:
            left, _, right = np.linalg.svd(m, full_matrices=False)
            factor = left @ right
            v = b2 * v + (1 - b2) * (factor**2).mean(1, keepdims=True)
            rows = factor / np.sqrt(v)
            step = 0.2 * np.sqrt(x.size) / np.linalg.norm(rows) * rows
        else:
            v = b2 * v + (1 - b2) * g**2
            step = m / (1 - b1**t) / np.sqrt(v / (1 - b2**t))
        x = x - lr * (step + weight_decay * x)
    return x


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(dtype: torch.dtype, options: dict[str, Any]) -> list[tuple[Array, Array]]:
    """The parameters after some steps, each with the oracle's."""
    params = [torch.nn.Parameter(drawn(i, shape, dtype)) for i, shape in enumerate(SHAPES)]
    starts = [p.detach().double().numpy().copy() for p in params]
    grads = [[drawn(100 * t + i, shape, dtype) for i, shape in enumerate(SHAPES)] for t in range(1, STEPS + 1)]
    optimizer = NorMuon(params, method="exact", **options)
    for each in grads:
        for p, grad in zip(params, each, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    seen = [[each[i].double().numpy() for each in grads] for i in range(len(SHAPES))]
    expected = [oracle(start, its, **options) for start, its in zip(starts, seen, strict=True)]
    return [(p.detach().double().numpy(), x) for p, x in zip(params, expected, strict=True)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_papers(options: dict[str, Any], dtype: torch.dtype, bound: float) -> None:
    for ours, expected in trained(dtype, options):
        assert np.linalg.norm(ours - expected) <= bound * np.linalg.norm(expected)


def test_the_iteration_orthogonalises_as_muon_does() -> None:
    """The factor of the default method is Muon's, which is exact to 0.3: the step's size is exact."""
    p = torch.nn.Parameter(torch.zeros(16, 48))
    optimizer = NorMuon([p], lr=1.0)
    p.grad = drawn(0, (16, 48), torch.float32)
    exact = np.linalg.svd(p.grad.double().numpy(), full_matrices=False)
    optimizer.step()
    step = -p.detach().double().numpy()
    assert np.sqrt((step**2).mean()) == pytest.approx(0.2, rel=1e-2)
    factor = exact[0] @ exact[2]
    assert (step * factor).sum() / np.linalg.norm(step) / np.linalg.norm(factor) > 0.97


def test_rows_have_step_sizes_of_their_own() -> None:
    p = torch.nn.Parameter(torch.zeros(6, 5))
    optimizer = NorMuon([p], lr=1.0)
    for t in range(20):
        p.grad = drawn(t, (6, 5), torch.float32)
        p.detach().zero_()
        optimizer.step()
    assert optimizer.state[p]["row_sq"].shape == (6,)
    rows = p.detach().square().mean(1).sqrt()
    assert float(rows.std() / rows.mean()) < 0.3


def repeated(case: Case) -> Any:
    """What takes processes, and what repeats for compressed state what is checked without."""
    return pytest.mark.broad if case.subject.options or case.check in RANK_CHECKS else ()


@conformance(NorMuon, ranks=2, marks=repeated)
def test_it_conforms(check: Callable[[], None]) -> None:
    check()
