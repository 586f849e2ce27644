"""The passes' kernels against torch's products, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from core.kit import normal
from psgd.test_lra import N, factors, fitted, followed, relative

from hb_psgd import lra_passes
from hb_psgd.lra_passes import NONE, Change, rewrite

pytest.importorskip("triton")
kernel = pytest.importorskip("hb_psgd.lra_kernel", exc_type=ImportError)
factor_kernel = pytest.importorskip("hb_psgd.lra_factor_kernel", exc_type=ImportError)
lra_moments = pytest.importorskip("hb_psgd.lra_moments", exc_type=ImportError)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EPS = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs Triton's interpreter, or a GPU"
)

RANKS = [1, 10, 27, 40]


def matrix(n, r, seed=0):
    return normal(n, r, seed=seed).float().to(DEVICE)


def vector(n, seed=0):
    return normal(n, seed=seed).float().to(DEVICE)


def number(value):
    return torch.tensor(float(value), device=DEVICE)


def close(ours, exact, terms, size):
    """Sums of so many terms, in float32 and some order, whose absolute values add up to ``size``: Higham 2002, section 4.2."""
    return bool(((ours.double() - exact).abs() <= 2 * EPS * terms**0.5 * size + 1e-30).all())


@pytest.mark.parametrize("n", [1, 300, 1025])
@pytest.mark.parametrize("r", RANKS)
def test_sums_over_all_rows(n, r, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    a, x, d = matrix(n, r), vector(n, seed=1), vector(n, seed=3)
    exact, size = a.double().mT @ (d * x).double(), a.abs().double().mT @ (d * x).abs().double()
    assert close(factor_kernel.inner(a, x, d, NONE), exact, n + 1, size)


@pytest.mark.parametrize("n", [1, 300])
@pytest.mark.parametrize("r", RANKS)
def test_a_vector_and_combinations_of_columns(n, r):
    a, x, c = matrix(n, r), vector(n, seed=1), vector(r, seed=2)
    exact, size = x.double() + a.double() @ c.double(), x.abs().double() + a.abs().double() @ c.abs().double()
    d, out = vector(n, seed=3), torch.empty_like(x)
    assert kernel.plus(x, a, c, d, out) is out and torch.equal(kernel.plus(x, a, c, d, None), out)
    assert close(out, exact * d, r + 2, size * d.abs())


@pytest.mark.parametrize("n", [1, 300, 1025])
@pytest.mark.parametrize("r", RANKS)
def test_moments_are_those_of_torch(n, r, monkeypatch):
    monkeypatch.setattr(kernel, "THIN_PROGRAMS", 3)
    u, v, x, y = matrix(n, r), matrix(n, r, seed=1), vector(n, seed=2), vector(n, seed=3)
    pairs = [(u, u), (v, v), (v, u), (u, x), (v, x), (u, y), (v, y)]
    for ours, (a, b) in zip(kernel.moments(u, v, x, y), pairs, strict=True):
        assert close(ours, a.double().mT @ b.double(), n + 3, a.abs().double().mT @ b.abs().double())  # 22 bits of each factor


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("r", [1, 7, 8, 31])
def test_all_columns_are_multiplied_with_each_other(r, parts):
    u, v, x, y = matrix(300, r), matrix(300, r, seed=1), vector(300, seed=2), vector(300, seed=3)
    w = torch.cat((u, v, x[:, None], y[:, None]), 1).double()
    made = lra_moments.grams(u, v, x, y, 3, parts)
    assert close(made, w.mT @ w, 303, w.abs().mT @ w.abs()) and torch.equal(made, made.mT)


def test_two_parts_of_ten_bits_are_as_good_as_twenty_two():
    """With high parts alone a product would be off by 2^-11: this is what the second one is for."""
    u = 1 + matrix(64, 1).abs()
    exact = float(u.double().square().sum())
    made = float(lra_moments.grams(u, u, u[:, 0].contiguous(), u[:, 0].contiguous(), 1, True)[0, 0])
    assert abs(made - exact) < 2**-20 * exact


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800000])
def test_what_is_not_finite_shows_in_the_moments(bits):
    u, v, x, y = matrix(40, 3), matrix(40, 3, seed=1), vector(40, seed=2), vector(40, seed=3)
    u[7, 1] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    made = lra_moments.grams(u, v, x, y, 1, True)
    assert not made[1].isfinite().any() and made[0, 0].isfinite()


@pytest.mark.parametrize("n", [1, 300, 1025])
@pytest.mark.parametrize("r", RANKS)
def test_a_vector_and_its_products_in_one_pass(n, r, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    a, x, c, d = matrix(n, r), vector(n, seed=1), vector(r, seed=2), vector(n, seed=3)
    kept = a.clone()
    y, back = factor_kernel.through(x, a, c, d, NONE)
    assert torch.equal(a, kept)
    exact = (d * x).double() + a.double() @ c.double()
    assert close(y, exact, r + 2, (d * x).abs().double() + a.abs().double() @ c.abs().double())
    assert close(back, a.double().mT @ y.double(), n, a.abs().double().mT @ y.abs().double())
    other_y, other_back = lra_passes.through(x.cpu().double(), a.cpu().double(), c.cpu().double(), d.cpu().double())
    assert relative(y, other_y.to(DEVICE)) < 1e-6 and relative(back, other_back.to(DEVICE)) < 1e-5


CHANGES = pytest.mark.parametrize(("turns", "moves"), [(True, True), (True, False), (False, True)])


def change(n, r, turns, moves):
    """What becomes of a factor."""
    turn = normal(r, r, seed=5).float().to(DEVICE) if turns else None
    columns, weights = ([vector(n, seed=6), vector(n, seed=7)], [vector(r, seed=8), vector(r, seed=9)]) if moves else ((), ())
    return Change(turn, columns, weights)


@CHANGES
@pytest.mark.parametrize("n", [1, 300, 1025])
@pytest.mark.parametrize("r", RANKS)
def test_a_factor_is_overwritten_and_multiplied_in_one_pass(r, n, turns, moves, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    a, x, c, d, new = matrix(n, r), vector(n, seed=1), vector(r, seed=2), vector(n, seed=3), change(n, r, turns, moves)
    wanted = a.clone()
    factor_kernel.rewrite(wanted, new)
    one, other = a.clone(), a.clone()
    sums = factor_kernel.inner(one, x, d, new)
    y, back = factor_kernel.through(x, other, c, d, new)
    assert torch.equal(one, wanted) and torch.equal(other, wanted)
    for found, by in ((sums, d * x), (back, y)):
        assert close(found, wanted.double().mT @ by.double(), n + 1, wanted.abs().double().mT @ by.abs().double())
    exact = (d * x).double() + wanted.double() @ c.double()
    assert close(y, exact, r + 2, (d * x).abs().double() + wanted.abs().double() @ c.abs().double())


@pytest.mark.parametrize("n", [1, 1500])
def test_a_diagonal_grows(n):
    d, gap = vector(n).abs(), vector(n, seed=1)
    exact = d.double() * (0.5 - 0.25 * gap.double())
    made = kernel.grown(d, gap, number(0.5), number(-0.25), None)
    assert bool(((made - exact).abs() <= 2 * EPS * d * (0.5 + 0.25 * gap.abs())).all())
    assert kernel.grown(d, gap, number(0.5), number(-0.25), d) is d and torch.equal(d, made)


@CHANGES
@pytest.mark.parametrize("r", RANKS)
def test_a_factor_is_overwritten(r, turns, moves):
    n = 300
    a, new = matrix(n, r), change(n, r, turns, moves)
    exact, size = a.double(), a.abs().double()
    if new.turn is not None:
        exact, size = exact @ new.turn.double(), size @ new.turn.abs().double()
    for c, w in zip(new.columns, new.weights, strict=True):
        exact, size = exact + torch.outer(c, w).double(), size + torch.outer(c, w).abs().double()
    made = a.clone()
    factor_kernel.rewrite(made, new)
    assert close(made, exact, r + 2, size)
    if not INTERPRETED:
        assert lra_passes._has_kernels(a)
    assert close(rewrite(a, new), exact, r + 2, size)


@pytest.mark.parametrize("n", [1, 1500])
def test_the_pair_of_vectors_and_their_sizes(n):
    t, probe, d = vector(n), vector(n, seed=1), vector(n, seed=2).abs()
    d[0] = 0
    x, y, sizes = kernel.pair(t, probe, d, 0.25, 0.5)
    wanted_x, wanted_y, wanted = lra_passes.pair(t.cpu(), probe.cpu(), d.cpu(), 0.25, 0.5)
    assert torch.allclose(x.cpu(), wanted_x, rtol=0, atol=float(4 * EPS * (d * (t.abs() + probe.abs())).max()))
    assert torch.allclose(y.cpu(), wanted_y, rtol=4 * EPS, atol=0)
    assert torch.allclose(torch.stack(sizes).cpu(), torch.stack(wanted), rtol=4 * EPS)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_is_noticed_and_left_out(bad):
    for make in (kernel.pair, lra_passes.pair):
        t, ones = vector(9), torch.ones(9, device=DEVICE)
        t[3] = bad
        x, _, sizes = make(t, ones, ones, 0.0, 0.0)
        assert x.isfinite().all() and float(x[3]) == 0 and [float(s) for s in sizes] == [torch.inf, torch.inf, 1.0]


@pytest.mark.parametrize("on_u", [True, False])
@pytest.mark.parametrize(("n", "r"), [(1, 1), (300, 10), (1025, 27)])
def test_what_a_fit_needs_of_both_vectors(n, r, on_u):
    u, v, x, y = matrix(n, r), matrix(n, r, seed=1), vector(n, seed=2), vector(n, seed=3)
    ux, vx, uy, vy = (vector(r, seed=s) for s in (4, 5, 6, 7))
    double = [z.cpu().double() for z in (u, v, x, y, ux, vx, uy, vy)]
    theirs = lra_passes.ends(*double[:4], torch.tensor(0.3, dtype=torch.float64), on_u, *double[4:])
    ours = kernel.ends(u, v, x, y, number(0.3), on_u, torch.stack((ux, uy)), torch.stack((vx, vy)))
    for found, exact in zip(ours, theirs, strict=True):
        assert float((found.cpu().double() - exact).norm() / exact.norm()) < 10 * EPS * (r + n) ** 0.5


@pytest.mark.skipif(not INTERPRETED, reason="the problem is on the CPU")
@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-9, 1e18, 1e25, 1e30])
def test_a_sudden_change_of_size_is_followed_as_without_kernels(size, monkeypatch):
    found = []
    for kernels in (True, False):
        monkeypatch.setattr(lra_passes, "_has_kernels", lambda a, kernels=kernels: kernels)
        u, v, d = factors(dtype=torch.float32)
        bounds = torch.zeros(3)
        for t in range(6):
            h = normal(N, seed=t).float() * (size if t > 1 else 1)
            u, v, d, bounds = fitted(h, normal(N, seed=50 + t).float(), u, v, d, bounds, t)
        found.append((u, v, d, bounds))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    assert found[0][2].abs().min() > 0


@pytest.mark.skipif(not INTERPRETED, reason="the oracle's problem is on the CPU")
def test_a_fit_by_kernels_equals_the_oracle(monkeypatch):
    monkeypatch.setattr(lra_passes, "_has_kernels", lambda a: a.dtype == torch.float32)
    (u, v, d, bounds), oracle = followed(12, torch.float32)
    for ours, theirs in zip((u, v, d, bounds), (oracle.u, oracle.v, oracle.d, np.array(oracle.bounds)), strict=True):
        assert relative(ours, theirs) < 2e-4
