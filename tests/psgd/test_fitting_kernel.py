"""A refresh's kernels against the operations of torch that they stand for, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from core.kit import normal

from hb_psgd import kron
from hb_psgd.factor_rules import RULES, Factor, Settings
from hb_psgd.fitting import fitted
from hb_psgd.kron import balance, per_block, whitening_scales
from hbcore.rules.products import IEEE

pytest.importorskip("triton")
kernel = pytest.importorskip("hb_psgd.fitting_kernel", exc_type=ImportError)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EPS = torch.finfo(torch.float32).eps
B = 3

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs Triton's interpreter, or a GPU"
)


def stack(*shape, seed=0):
    return normal(B, *shape, seed=seed).float().to(DEVICE)


def positive(*shape, seed=0):
    return stack(*shape, seed=seed).abs() + 0.1


@pytest.mark.parametrize("n", [1, 2048, 5000])
def test_noise_is_added_in_proportion(n):
    g, noise = stack(n), stack(n, seed=1)
    wanted = g.double() + (0.01 + 0.1 * g.abs().double()) * noise.double()
    torch.testing.assert_close(kernel.dampened(g, noise, 0.01, 0.1).double(), wanted, rtol=4 * EPS, atol=4 * EPS)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e18, 3e38])
@pytest.mark.parametrize("dampening", [0.0, 1e-9])
def test_scales_are_those_of_float64(size, dampening, monkeypatch):
    """The blocks of two stacks; one of their pieces is much smaller than the others, and the last block is zeros."""
    monkeypatch.setattr(kernel, "PIECES", 4)
    monkeypatch.setattr(kernel, "BLOCK", 128)
    rising = torch.logspace(-3, 0, 2800, device=DEVICE).view(70, 40)
    xs = [stack(70, 40).clamp(-1, 1) * rising * size, stack(7, seed=2).clamp(-1, 1) * size]
    xs[0][1, :20] *= 1e-6
    xs[1][2] = 0
    exact = [float((x.double().pow(4).mean() + dampening**4) ** (-1 / 8)) if x.any() else 0.0 for pair in xs for x in pair]
    torch.testing.assert_close(kernel.whitening_scales(xs, dampening).cpu(), torch.tensor(exact), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        whitening_scales([x.cpu() for x in xs], dampening).float(), torch.tensor(exact), rtol=1e-6, atol=0
    )


def test_what_is_not_finite_has_no_scale(monkeypatch):
    monkeypatch.setattr(kernel, "PIECES", 4)
    x = torch.ones(B, 50, 50, device=DEVICE)
    x[0, 0, 0], x[1, 49, 49] = float("inf"), float("nan")
    assert kernel.whitening_scales([x], 1e-9).tolist() == [0, 0, 1]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("n", [1, 64, 150])
def test_a_factor_is_moved_by_a_product(n, mirrored):
    x, q, step, level = stack(n, n), stack(n, n, seed=1), positive(seed=2), positive(seed=3)
    s = 0.5 * step.double().view(B, 1, 1)
    wanted = q.double() * (1 + s * level.double().view(B, 1, 1)) - s * x.double()
    wanted = (wanted + wanted.mT) / 2 if mirrored else wanted
    made = kernel.moved(x, q, step, level, 0.5, mirrored)
    assert made is x
    torch.testing.assert_close(made.double(), wanted, rtol=4 * EPS, atol=16 * EPS)
    assert not mirrored or torch.equal(made, made.mT)


@pytest.mark.parametrize("rule", ["quad", "pro"])
@pytest.mark.parametrize("n", [1, 100, 5000])
def test_a_diagonal_is_fitted_as_by_torch(rule, n):
    q, share, bound, first = stack(n), positive(seed=1), positive(seed=2), stack(n, seed=3).square()
    share[1] = 0
    halves = RULES[rule].halves
    old, new, risen = kernel.diagonal(q, share, bound, first, 0.1, 0.8, 1.5, halves)
    begun = kron.begin([q.double()], share.double())[0]
    level, start = torch.full((B,), 1.5, dtype=torch.float64, device=DEVICE), torch.empty(B, 0, n, device=DEVICE)
    factor = Factor(begun, share.double(), bound.double(), first.double(), level, start)
    wanted, wanted_bound = fitted(RULES[rule], factor, Settings(0.1, 0.8, 2, IEEE))
    torch.testing.assert_close(old.double(), begun, rtol=4 * EPS, atol=4 * EPS)
    torch.testing.assert_close(new.double(), wanted, rtol=16 * EPS, atol=16 * EPS)
    torch.testing.assert_close(risen.double(), wanted_bound, rtol=4 * EPS, atol=0)
    same, again, bounds = kernel.diagonal(old, None, bound, first, 0.1, 0.8, 1.5, halves)
    assert same is old and torch.equal(again, new) and torch.equal(bounds, risen)


def test_a_diagonal_that_is_not_finite_has_no_finite_bound():
    first = torch.ones(B, 10, device=DEVICE)
    first[0, 3], first[1, 9] = float("inf"), float("nan")
    q, share, bound = torch.ones(B, 10, device=DEVICE), torch.zeros(B, device=DEVICE), torch.ones(B, device=DEVICE)
    assert kernel.diagonal(q, share, bound, first, 0.1, 0.8, 1.0, 2)[2].isfinite().tolist() == [False, False, True]


@pytest.mark.parametrize("shape", [(7,), (40, 60)])
def test_factors_are_balanced_or_stay_as_they_were(shape):
    new, old = stack(*shape), stack(*shape, seed=1)
    sizes = torch.tensor([[1.0, 4.0, 9.0], [2.0, 2.0, float("inf")]], device=DEVICE)
    share, good = balance(sizes, torch.ones_like(sizes))
    wanted = torch.where(per_block(good, new), new * per_block(share[0], new), old)
    kernel.settled(new, old, share[0], good)
    assert torch.equal(new, wanted) and good.tolist() == [True, True, False]
    assert torch.allclose(share[0][:2], torch.tensor([2**0.5, 0.5**0.5], device=DEVICE))
