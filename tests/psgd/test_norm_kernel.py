"""The kernels of bounds of norms against the operations of torch that they stand for, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from core.kit import normal

from hb_psgd.norms import norm_bound

pytest.importorskip("triton")
kernel = pytest.importorskip("hb_psgd.norm_kernel", exc_type=ImportError)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
B = 3
LR, BETA = 0.1, 0.8

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs Triton's interpreter, or a GPU"
)


def positive(n, rank=None, seed=0):
    """Symmetric positive matrices."""
    raw = normal(B, n, rank or n, seed=seed)
    return raw @ raw.mT


def wanted(a, start, level, bound, iterations):
    """Bounds and steps in float64."""
    norm = norm_bound(a.double(), start.double(), iterations) + level.double()
    made = torch.maximum(BETA * bound.double() + (1 - BETA) * norm, norm)
    return made, LR / made


def found(a, start, level, bound, iterations):
    given = [t.float().to(DEVICE) for t in (a, start, level, bound)]
    return [t.cpu().double() for t in kernel.bounded(*given, LR, BETA, iterations)]


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (5, 5), (40, 2), (150, 150)])
def test_bounds_are_those_of_float64(n, rank, iterations):
    a, start = positive(n, rank), normal(B, 4, n, seed=1)
    level, bound = normal(B, seed=2).abs(), torch.tensor([0.0, 1e6, 1.0], dtype=torch.float64)
    for made, exact in zip(found(a, start, level, bound, iterations), wanted(a, start, level, bound, iterations), strict=True):
        torch.testing.assert_close(made, exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-12, 1.0, 1e12, 1e30, 1e36])
def test_matrices_of_every_size_have_bounds(size):
    a = size * positive(20) / 50
    start, none = normal(B, 4, 20, seed=1), torch.zeros(B, dtype=torch.float64)
    torch.testing.assert_close(found(a, start, none, none, 2)[0], wanted(a, start, none, none, 2)[0], rtol=2e-5, atol=0)


def test_a_matrix_that_is_zero_or_not_finite_harms_no_other():
    a, start, none = positive(6), normal(B, 4, 6, seed=1), torch.zeros(B, dtype=torch.float64)
    exact = wanted(a, start, none, none, 2)[0][2]
    a[0], a[1, 2, 3] = 0, float("inf")
    bounds, _ = found(a, start, none + torch.tensor([0.5, 0, 0]), none, 2)
    assert float(bounds[0]) == 0.5 and not bounds[1].isfinite()
    torch.testing.assert_close(bounds[2], exact, rtol=2e-5, atol=0)
    a[1, 2, 3] = float("nan")
    assert not found(a, start, none, none, 2)[0][1].isfinite()


def test_random_vectors_are_left_as_they_were():
    a, start, none = positive(6), normal(B, 4, 6, seed=1), torch.zeros(B)
    given = start.float().to(DEVICE)
    kernel.bounded(a.float().to(DEVICE), given, none.to(DEVICE), none.to(DEVICE), LR, BETA, 2)
    assert torch.equal(given.cpu(), start.float())
