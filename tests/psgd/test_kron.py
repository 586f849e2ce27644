"""The building blocks of Kronecker-factored preconditioners, each against a formula that is written out."""

from __future__ import annotations

import pytest
import torch
from core.kit import normal

from hb_psgd.kron import (
    LARGEST_TURN,
    balance,
    begin,
    memory_layout,
    norm_bound,
    precondition,
    pro_update,
    procrustes,
    second_moments,
    whitening_scale,
)
from hbcore.errors import OptionError

B = 3


def factors_for(shape, dense, seed=0):
    return [normal(B, n, n, seed=seed + i) if d else normal(B, n, seed=seed + i) for i, (n, d) in enumerate(zip(shape, dense))]  # noqa: B905


class TestMemoryLayout:
    """Which factors are dense."""

    @pytest.mark.parametrize(
        ("shape", "mode", "dense"),
        [
            ((1024, 128), "smart_one_diag", (False, True)),
            ((128, 1024), "smart_one_diag", (True, False)),
            ((128, 128), "smart_one_diag", (True, True)),
            ((128, 128), "one_diag", (True, False)),
            ((1024, 128), "one_diag", (False, True)),
            ((64, 32, 3, 3), None, (True,) * 4),
            ((64, 32, 3, 3), "one_diag", (False, True, True, True)),
            ((64, 64, 3, 3), "one_diag", (True, False, True, True)),
            ((64, 64, 3, 3), "smart_one_diag", (True,) * 4),
            ((64, 32, 3, 3), "one_triu", (False, False, True, False)),
            ((1024, 128), "one_triu", (False, True)),
            ((1024, 128), "all_diag", (False, False)),
            ((4096, 128), None, (False, True)),
            ((2048, 2049), None, (True, False)),
            ((4096, 128), "one_diag", (False, True)),
            ((7, 1), None, (True, False)),
            ((7,), None, (False,)),
            ((1,), None, (False,)),
            ((), None, ()),
            ((0,), "smart_one_diag", (False,)),
        ],
        ids=str,
    )
    def test_table(self, shape, mode, dense):
        assert memory_layout(shape, memory_save_mode=mode) == dense

    def test_limits(self):
        assert memory_layout((7,), min_ndim_triangular=1) == (True,)
        assert memory_layout((7,), min_ndim_triangular=1, memory_save_mode="smart_one_diag") == (True,)
        assert memory_layout((7,), min_ndim_triangular=1, memory_save_mode="one_diag") == (False,)
        assert memory_layout((7, 8), min_ndim_triangular=3) == (False, False)
        assert memory_layout((7, 8), max_size_triangular=7) == (True, False)

    def test_unknown_modes_are_refused(self):
        with pytest.raises(OptionError, match="'all_diag'"):
            memory_layout((2, 2), memory_save_mode="two_diag")


@pytest.mark.parametrize("dense", [(True, True, True), (False, True, False), (True, False, True), (False,) * 3], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 2), (20, 2, 3)], ids=str)
def test_precondition_applies_the_kronecker_product(shape, dense):
    x, factors = normal(B, *shape, seed=9), factors_for(shape, dense)
    ours = precondition(x, factors)
    for b in range(B):
        q = torch.ones(1, 1, dtype=torch.float64)
        for f in factors:
            q = torch.kron(q, f[b] if f.ndim == 3 else torch.diag(f[b]))
        assert torch.allclose(ours[b].flatten(), q.mT @ q @ x[b].flatten(), rtol=1e-11)


def test_second_moments_are_sums_over_the_other_dimensions():
    x = normal(B, 3, 4, 2)
    for i, formula in enumerate(["zabc,zdbc->zad", "zabc,zadc->zbd", "zabc,zabd->zcd"]):
        whole = torch.einsum(formula, x, x)
        assert torch.allclose(second_moments(x, i, True), whole, rtol=1e-12)
        assert torch.allclose(second_moments(x, i, False), whole.diagonal(dim1=1, dim2=2), rtol=1e-12)
    assert torch.equal(second_moments(x[:, :, 0, 0], 0, False), x[:, :, 0, 0] ** 2)


class TestNormBound:
    """norm_bound."""

    @pytest.mark.parametrize("n", [2, 5, 40, 100])
    @pytest.mark.parametrize("kind", ["positive", "skew", "rank-one"])
    def test_it_is_below_the_norm_and_near_it(self, n, kind):
        raw = normal(B, n, n)
        a = {"positive": raw @ raw.mT, "skew": raw - raw.mT, "rank-one": raw[:, :, :1] @ raw[:, :, :1].mT}[kind]
        exact = torch.linalg.matrix_norm(a, 2)
        bound = norm_bound(a, normal(B, 32, n, seed=1))
        assert bool((bound <= exact * (1 + 1e-12)).all())
        assert bool((bound >= exact * 0.85).all())
        assert bool((norm_bound(a, normal(B, 32, n, seed=1), iterations=10) >= exact * 0.95).all())

    def test_a_long_row_off_the_norms_direction_does_not_mislead_it(self):
        a = torch.zeros(1, 101, 101, dtype=torch.float64)
        a[0, :100, :100] = 1.0  # norm 100, rows of length 10
        a[0, 100, 100] = 11.0
        assert float(norm_bound(a, normal(1, 32, 101))) > 99

    @pytest.mark.parametrize("scale", [1e-35, 1e-20, 1.0, 1e18])
    def test_it_scales_in_float32(self, scale):
        raw = normal(B, 20, 20, dtype=torch.float32)
        a, start = raw @ raw.mT, normal(B, 32, 20, seed=1, dtype=torch.float32)
        assert torch.allclose(norm_bound(a * scale, start), norm_bound(a, start) * scale, rtol=1e-4)

    def test_zeros_have_the_bound_zero(self):
        assert torch.equal(norm_bound(torch.zeros(B, 4, 4), torch.ones(B, 32, 4)), torch.zeros(B))


class TestProcrustes:
    """procrustes."""

    def test_steps_make_a_matrix_symmetric_and_keep_its_gram_matrix(self):
        raw = normal(B, 6, 6)
        symmetric = raw @ raw.mT + torch.eye(6, dtype=torch.float64)
        skew = normal(B, 6, 6, seed=3)
        q = turned = torch.linalg.matrix_exp(0.3 * (skew - skew.mT)) @ symmetric
        for step in range(40):
            q = procrustes(q, normal(B, 32, 6, seed=step))
        assert bool((torch.linalg.matrix_norm(q - q.mT) < 1e-3 * torch.linalg.matrix_norm(q)).all())
        assert torch.allclose(q.mT @ q, turned.mT @ turned, rtol=0.02, atol=0.02 * float(turned.square().amax()))
        assert torch.allclose(q, symmetric, rtol=0.02, atol=0.02 * float(symmetric.amax()))

    def test_a_step_turns_by_an_eighth_at_most(self):
        q = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]], dtype=torch.float64)  # a quarter turn from the identity
        turn = procrustes(q, normal(1, 32, 2)) @ q.mT  # = exp(a R), R a rotation's generator
        angle = torch.atan2(turn[0, 1, 0], turn[0, 0, 0]).abs()
        assert float(angle) == pytest.approx(LARGEST_TURN, rel=1e-2)

    @pytest.mark.parametrize("q", [torch.zeros(2, 3, 3), torch.eye(3).expand(2, 3, 3)], ids=["zeros", "identity"])
    def test_symmetric_matrices_stay(self, q):
        assert torch.equal(procrustes(q, torch.ones(2, 32, 3)), q)


class TestProUpdate:
    """pro_update."""

    def test_a_diagonal_factor_follows_the_formula(self):
        g, q, bound = normal(B, 5), normal(B, 5, seed=1).abs() + 0.5, torch.tensor([0.0, 3.0, 90.0], dtype=torch.float64)
        [new], [new_bound] = pro_update(g, [q], [bound], lr=0.1, beta=0.9, probe=torch.randn_like)
        square = (q * q * g) ** 2
        ell = square.amax(-1) + 1
        expected_bound = torch.maximum(0.9 * bound + 0.1 * ell, ell)
        assert torch.allclose(new_bound, expected_bound, rtol=1e-14)
        assert float(new_bound[2]) == pytest.approx(81 + 0.1 * float(ell[2]))  # it decays slowly
        assert torch.allclose(new, q * (1 - 0.1 / expected_bound[:, None] * (square - 1)), rtol=1e-13)

    def test_lr_0_changes_no_preconditioner(self):
        g, factors = normal(B, 4, 3), [normal(B, 4, 4, seed=1), normal(B, 3, seed=2)]
        symmetric = [factors[0] @ factors[0].mT, factors[1]]
        zero = torch.zeros(B, dtype=torch.float64)
        new, _ = pro_update(g, symmetric, [zero, zero], lr=0.0, beta=0.9, probe=torch.randn_like)
        assert torch.allclose(precondition(g, new), precondition(g, symmetric), rtol=1e-9)

    def test_whitened_input_is_a_fixed_point_on_average(self):
        g = normal(4000, 3, 2)
        factors = begin(
            [torch.zeros(4000, 3, 3).double(), torch.zeros(4000, 2).double()], torch.ones(4000) > 0, torch.ones(4000)
        )
        new, _ = pro_update(g, factors, [torch.zeros(4000).double()] * 2, lr=0.01, beta=0.9, probe=torch.randn_like)
        assert torch.allclose(new[0].mean(0), torch.eye(3, dtype=torch.float64), atol=2e-3)

    def test_probes_are_drawn_for_dense_factors_alone(self):
        shapes = []

        def probe(like):
            shapes.append(tuple(like.shape))
            return torch.randn_like(like)

        bounds = [torch.zeros(B, dtype=torch.float64)] * 3
        pro_update(normal(B, 4, 3, 5), factors_for((4, 3, 5), (True, False, True)), bounds, lr=0.1, beta=0.9, probe=probe)
        assert shapes == [(B, 32, 4), (B, 32, 5)]


class TestBalance:
    """balance."""

    def test_largest_elements_become_equal_and_the_preconditioner_stays(self):
        x, factors = normal(B, 4, 3, 5), factors_for((4, 3, 5), (True, False, True))
        uneven = [factors[0] * 1e12, factors[1] * 1e-9, factors[2]]
        even = balance(uneven)
        sizes = torch.stack([q.abs().flatten(1).amax(-1) for q in even])
        assert torch.allclose(sizes, sizes[0].expand_as(sizes), rtol=1e-12)
        assert torch.allclose(precondition(x, even), precondition(x, uneven), rtol=1e-9)

    def test_zeros_stay(self):
        factors = [torch.zeros(B, 2, 2), torch.zeros(B, 3)]
        assert all(torch.equal(a, b) for a, b in zip(balance(factors), factors, strict=True))


def test_whitening_scale():
    x = normal(B, 30, 20) * torch.tensor([1e-3, 1.0, 0.0], dtype=torch.float64).view(B, 1, 1)
    scale = whitening_scale(x, 1e-9)
    assert scale[2] == 0
    assert torch.allclose(scale[:2], x[:2].pow(4).mean((1, 2)) ** (-1 / 8), rtol=1e-12)
    assert float(whitening_scale(torch.full((1, 2), 1e-12), 1e-9)) == pytest.approx(1e9**0.5, rel=1e-3)
    assert float(whitening_scale(torch.full((1, 2), 1e-12), 0.0)) == pytest.approx(1e12**0.5, rel=1e-3)


def test_begin_replaces_the_factors_of_some_blocks():
    factors = factors_for((4, 3), (True, False))
    where, scale = torch.tensor([True, False, True]), torch.tensor([4.0, 9.0, 0.25], dtype=torch.float64)
    dense, diagonal = begin(factors, where, scale)
    assert torch.equal(dense[1], factors[0][1]) and torch.equal(diagonal[1], factors[1][1])
    assert torch.allclose(dense[0], 2 * torch.eye(4, dtype=torch.float64))
    assert torch.allclose(diagonal[2], torch.full((3,), 0.5, dtype=torch.float64))
