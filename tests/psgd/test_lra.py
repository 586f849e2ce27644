"""The low-rank preconditioner's maths against its float64 oracle, what it whitens, and what it must survive."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from core.kit import normal
from reference.psgd_lra import LowRank

from hb_psgd import lra, lra_passes

N, R = 37, 4
ALONE = lra.Sums(lambda x: x, torch.amax)


def factors(n=N, r=R, dtype=torch.float64, seed=0):
    """U, V and d of no particular size, the d positive."""
    u, v = normal(n, r, seed=seed), normal(n, r, seed=seed + 1)
    return (0.3 * u).to(dtype), (0.5 * v).to(dtype), (normal(n, seed=seed + 2).exp()).to(dtype)


def fitted(h, probe, u, v, d, bounds, turn, sums=ALONE, **options):
    settings = {"lr": 0.1, "beta": 0.9, "eps": 1e-8, "dampening": 0.0, "relative": 0.0, "balance": turn % 3 == 0, **options}
    fit = lra.fit(h, probe, u, v, d, bounds, on_u=turn % 2 == 0, sums=sums, **settings)
    return lra_passes.rewrite(u.clone(), fit.u), lra_passes.rewrite(v.clone(), fit.v), fit.d, fit.bounds


def relative(ours, theirs):
    theirs = torch.as_tensor(theirs)
    return float((ours.double() - theirs).norm() / theirs.norm())


def followed(steps, dtype, r=R, **options):
    """The state after some steps, ours and the oracle's, for gradients of all sizes."""
    u, v, d = factors(r=r, dtype=dtype)
    oracle = LowRank(u.double().numpy(), v.double().numpy(), d.double().numpy())
    bounds = torch.zeros(3, dtype=dtype)
    for t in range(steps):
        h, probe = (normal(N, seed=100 + t) * 2.0 ** (t % 5 - 2)).to(dtype), normal(N, seed=500 + t).to(dtype)
        u, v, d, bounds = fitted(h, probe, u, v, d, bounds, t, **options)
        if t % 3 == 0:
            oracle.balance()
        oracle.fit(h.double().numpy(), probe.double().numpy(), t % 2 == 0, 0.1, 0.9, 1e-8)
    return (u, v, d, bounds), oracle


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("r", [1, 4])
def test_forty_steps_equal_the_oracle(dtype, bound, r):
    (u, v, d, bounds), oracle = followed(40, dtype, r)
    for ours, theirs in zip((u, v, d, bounds), (oracle.u, oracle.v, oracle.d, np.array(oracle.bounds)), strict=True):
        assert relative(ours, theirs) < bound


def test_the_preconditioner_is_the_product_written_out():
    u, v, d = factors()
    x = normal(N, seed=9)
    whole = LowRank(u.numpy(), v.numpy(), d.numpy()).precondition(x.numpy())
    assert relative(lra.precondition(x, u, v, d, lambda t: t), whole) < 1e-13


def test_balancing_leaves_the_product_of_the_factors_alone():
    u, v, _ = factors()
    a, b = lra.balancing((100 * u).mT @ (100 * u), v.mT @ v)
    assert relative((100 * u @ a) @ (v @ b).mT, 100 * u @ v.mT) < 1e-4
    assert abs(float((100 * u @ a).norm() / (v @ b).norm()) - 1) < 0.05


@pytest.mark.parametrize("piece", [1, 5, N])
def test_products_over_all_rows_are_summed_piece_by_piece(piece, monkeypatch):
    u, v, d = factors()
    args = (normal(N, seed=3), normal(N, seed=4), u, v, d, torch.zeros(3, dtype=torch.float64))
    whole = fitted(*args, 0)
    monkeypatch.setattr(lra_passes, "PIECE", piece)
    assert all(relative(a, b) < 1e-13 for a, b in zip(fitted(*args, 0), whole, strict=True))


def test_rows_are_rewritten_piece_by_piece(monkeypatch):
    u, v, d = factors()
    args = (normal(N, seed=3), normal(N, seed=4), u, v, d, torch.zeros(3, dtype=torch.float64))
    whole = fitted(*args, 0)
    monkeypatch.setattr(lra_passes, "ROWS", 8)
    assert all(relative(a, b) < 1e-14 for a, b in zip(fitted(*args, 0), whole, strict=True))


class Meeting:
    """Two threads that add what each has, as ranks do."""

    def __init__(self) -> None:
        self.brought = [torch.zeros(()), torch.zeros(())]
        self.barrier = threading.Barrier(2, timeout=30)

    def exchange(self, k, x, how):
        self.brought[k] = x
        self.barrier.wait()
        result = how(*self.brought)
        self.barrier.wait()
        return result

    def sums(self, k):
        return lra.Sums(lambda x: self.exchange(k, x, torch.add), lambda x: self.exchange(k, x.amax(), torch.maximum))


@pytest.mark.parametrize("cut", [20, N])
def test_parts_of_the_vector_on_two_ranks_are_fitted_as_one_vector(cut):
    u, v, d = factors()
    args, bounds = (normal(N, seed=3), normal(N, seed=4), u, v, d), torch.zeros(3, dtype=torch.float64)
    whole = fitted(*args, bounds, 0)
    meeting, parts = Meeting(), (slice(0, cut), slice(cut, N))

    def rank(k):
        return fitted(*(t[parts[k]] for t in args), bounds, 0, sums=meeting.sums(k))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert all(relative(torch.cat([a, b]), c) < 1e-12 for a, b, c in zip(first[:3], second[:3], whole[:3], strict=True))
    assert relative(first[3], whole[3]) < 1e-12


def test_vectors_of_a_known_covariance_become_white():
    """The covariance is one that a preconditioner of this rank whitens, P C P = I, and of condition 31."""
    n, r, steps = 12, 2, 1500
    rng = np.random.default_rng(0)
    wanted = LowRank(0.12 * rng.standard_normal((n, r)), 0.12 * rng.standard_normal((n, r)), np.linspace(0.6, 1.4, n)).q()
    covariance = np.linalg.inv(wanted.T @ wanted @ wanted.T @ wanted)
    assert np.linalg.cond(covariance) > 30
    vectors = normal(steps, n, seed=5) @ torch.from_numpy(np.linalg.cholesky(covariance)).mT
    u, v = (normal(n, r, seed=s) * (0.1 / (n * r)) ** 0.5 for s in (1, 2))
    d, bounds = torch.ones(n, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t, probe in enumerate(normal(steps, n, seed=6)):
        lr = 0.2 * min(1.0, max(0.02, 3 * (1 - t / steps) ** 2))
        u, v, d, bounds = fitted(vectors[t], probe, u, v, d, bounds, t, lr=lr)
    q = LowRank(u.numpy(), v.numpy(), d.numpy()).q()
    white = np.linalg.eigvalsh(q.T @ q @ covariance @ q.T @ q)
    assert 0.6 < white.min() < white.max() < 1.5


def test_vectors_of_condition_10_become_white_within_a_tenth():
    """At this learning rate, of which the noise of one vector a step is what is left after 1,600 steps."""
    n, r, steps = 120, 3, 2200
    rng = np.random.default_rng(0)
    wanted = LowRank(0.02 * rng.standard_normal((n, r)), 0.02 * rng.standard_normal((n, r)), np.linspace(0.72, 1.28, n)).q()
    covariance = np.linalg.inv(wanted.T @ wanted @ wanted.T @ wanted)
    assert 9.9 < np.linalg.cond(covariance) < 10.1
    vectors = normal(steps, n, seed=5) @ torch.from_numpy(np.linalg.cholesky(covariance)).mT
    u, v = (normal(n, r, seed=s) * (0.1 / (n * r)) ** 0.5 for s in (1, 2))
    d, bounds, path = torch.ones(n, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), []
    for t, probe in enumerate(normal(steps, n, seed=6)):
        u, v, d, bounds = fitted(vectors[t], probe, u, v, d, bounds, t, lr=0.01)
        if not t or (t > 1600 and t % 25 == 0):
            q = LowRank(u.numpy(), v.numpy(), d.numpy()).q()
            path.append(float(np.linalg.norm(q.T @ q @ covariance @ q.T @ q - np.eye(n)) / n**0.5))
    assert path[0] > 0.9
    assert sum(path[1:]) / len(path[1:]) < 0.1, path


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e18, 1e25])
def test_a_scale_that_is_far_off_is_put_right_at_once(size):
    """The factors were fitted to vectors of one size, and meet others of another."""
    u, v, _ = factors(dtype=torch.float32)
    d, bounds = torch.full((N,), size**-0.5), torch.zeros(3)
    for t in range(6):
        h, probe = normal(N, seed=t, dtype=torch.float32), normal(N, seed=50 + t, dtype=torch.float32)
        u, v, d, bounds = fitted(h, probe, u, v, d, bounds, t)
    assert all(t.isfinite().all() for t in (u, v, d, bounds))
    assert 0.01 < float(lra.precondition(h, u, v, d, lambda t: t).square().mean().sqrt()) < 100
    assert bounds.max() < 1e6


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_nothing_is_fitted_to_zeros_or_to_what_is_not_finite(value):
    u, v, d = factors(dtype=torch.float32)
    h = torch.full((N,), value)
    bounds = torch.rand(3, generator=torch.Generator().manual_seed(0))
    if not value:
        d = torch.zeros(N)  # what a rule begins with
    new = fitted(h, normal(N, dtype=torch.float32), u, v, d, bounds, 1)
    assert all(torch.equal(a, b) for a, b in zip(new, (u, v, d, bounds), strict=True))


def test_a_singular_factor_changes_nothing():
    """1 + v u = 0: Q has no inverse."""
    u, v, d = torch.tensor([[1.0], [0.0]]), torch.tensor([[-1.0], [0.0]]), torch.ones(2)
    new = fitted(torch.ones(2), torch.ones(2), u, v, d, torch.ones(3), 1)
    assert all(torch.equal(a, b) for a, b in zip(new, (u, v, d, torch.ones(3)), strict=True))


@pytest.mark.parametrize("size", [1e-30, 1e-5, 1.0, 1e18, 1e25])
def test_the_first_scale_makes_elements_of_size_one(size):
    x = (normal(N, seed=1) * size).float()
    d = lra.begun(torch.zeros(N), x, 0.0, N, ALONE, 1.0, None)
    assert float((d.double().square() * x.double()).square().mean().sqrt()) == pytest.approx(1, rel=0.5)
    assert torch.equal(lra.begun(d, 5 * x, 0.0, N, ALONE, 1.0, None), d)
    assert not lra.begun(torch.zeros(N), 0 * x, 1e-9, N, ALONE, 1.0, None).any()
