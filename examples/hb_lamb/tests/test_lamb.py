"""LAMB against a float64 oracle written from the paper, and in the conformance kit, with two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hb_lamb import LAMB
from hbcore.testing import RANK_CHECKS, Case, conformance

Array = NDArray[np.float64]

SHAPES = ((5, 7), (8, 3), (8, 3), (13,), ())
STEPS = 10


OPTIONS: list[dict[str, Any]] = [{"lr": 0.01}, {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.1}, {"lr": 0.1, "eps": 0.5}]


def oracle(
    x: Array,
    grads: list[Array],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> Array:
    """Algorithm 2 of arXiv:1904.00962, with phi the identity."""
    (b1, b2), m, v = betas, np.zeros_like(x), np.zeros_like(x)
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        ratio = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        r = ratio + weight_decay * x
        x = x - lr * np.linalg.norm(x) / np.linalg.norm(r) * r
    return x


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(dtype: torch.dtype, options: dict[str, Any]) -> list[tuple[Array, Array]]:
    """The parameters after some steps, each with the oracle's."""
    params = [torch.nn.Parameter(drawn(i, shape, dtype)) for i, shape in enumerate(SHAPES)]
    starts = [p.detach().double().numpy().copy() for p in params]
    grads = [[drawn(100 * t + i, shape, dtype) for i, shape in enumerate(SHAPES)] for t in range(1, STEPS + 1)]
    optimizer = LAMB(params, division_backend="eps_add", **options)
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


def test_a_step_is_as_long_as_its_parameter_times_lr() -> None:
    p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = LAMB([p], lr=0.1)
    p.grad = torch.tensor([1e-3, 1e6])
    optimizer.step()
    assert float((p.detach() - torch.tensor([3.0, 4.0])).norm()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(("start", "grad", "end"), [(0.0, 1.0, -0.1), (2.0, 0.0, 2.0)], ids=["no weight", "no gradient"])
def test_where_a_norm_is_zero_the_ratio_is_one(start: float, grad: float, end: float) -> None:
    p = torch.nn.Parameter(torch.full((4,), start))
    optimizer = LAMB([p], lr=0.1)
    p.grad = torch.full((4,), grad)
    optimizer.step()
    assert p.tolist() == pytest.approx([end] * 4, rel=1e-5)


def repeated(case: Case) -> Any:
    """What takes processes, and what repeats for compressed state what is checked without."""
    return pytest.mark.broad if case.subject.options or case.check in RANK_CHECKS else ()


@conformance(LAMB, ranks=2, marks=repeated)
def test_it_conforms(check: Callable[[], None]) -> None:
    check()
