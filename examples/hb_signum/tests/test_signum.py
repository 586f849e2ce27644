"""Signum against a float64 oracle written from the paper, and in the conformance kit, with two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hb_signum import Signum
from hbcore.testing import RANK_CHECKS, Case, conformance

Array = NDArray[np.float64]

SHAPES = ((5, 7), (8, 3), (8, 3), (13,), ())
STEPS = 10


OPTIONS: list[dict[str, Any]] = [{"lr": 0.01}, {"lr": 0.1, "beta": 0.5, "weight_decay": 0.1}, {"lr": 0.1, "beta": 0.0}]


def oracle(x: Array, grads: list[Array], lr: float, beta: float = 0.9, weight_decay: float = 0.0) -> Array:
    """Algorithm 2 of arXiv:1802.04434, on one worker, with decoupled weight decay."""
    m = np.zeros_like(x)
    for g in grads:
        m = beta * m + (1 - beta) * g
        x = x - lr * (np.sign(m) + weight_decay * x)
    return x


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(dtype: torch.dtype, options: dict[str, Any]) -> list[tuple[Array, Array]]:
    """The parameters after some steps, each with the oracle's."""
    params = [torch.nn.Parameter(drawn(i, shape, dtype)) for i, shape in enumerate(SHAPES)]
    starts = [p.detach().double().numpy().copy() for p in params]
    grads = [[drawn(100 * t + i, shape, dtype) for i, shape in enumerate(SHAPES)] for t in range(1, STEPS + 1)]
    optimizer = Signum(params, **options)
    for each in grads:
        for p, grad in zip(params, each, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    seen = [[each[i].double().numpy() for each in grads] for i in range(len(SHAPES))]
    expected = [oracle(start, its, **options) for start, its in zip(starts, seen, strict=True)]
    return [(p.detach().double().numpy(), x) for p, x in zip(params, expected, strict=True)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_papers(options: dict[str, Any], dtype: torch.dtype, bound: float) -> None:
    for ours, expected in trained(dtype, options):
        assert np.linalg.norm(ours - expected) <= bound * np.linalg.norm(expected)


def test_its_steps_are_of_one_size() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = Signum([p], lr=0.25)
    p.grad = torch.tensor([1e-20, -1e20, 0.0])
    optimizer.step()
    assert p.tolist() == [-0.25, 0.25, 0.0]


def repeated(case: Case) -> Any:
    """What takes processes, and what repeats for compressed state what is checked without."""
    return pytest.mark.broad if case.subject.options or case.check in RANK_CHECKS else ()


@conformance(Signum, ranks=2, marks=repeated)
def test_it_conforms(check: Callable[[], None]) -> None:
    check()
