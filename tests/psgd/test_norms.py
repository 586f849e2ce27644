"""Bounds of norms, and steps towards symmetric matrices."""

from __future__ import annotations

import pytest
import torch
from core.kit import normal

from hb_psgd.norms import LARGEST_TURN, largest, norm_bound, procrustes
from hbcore.rules.products import IEEE

B = 3


def test_the_largest_magnitude_is_of_either_sign_and_nan_if_one_is_there():
    x = torch.tensor([[[1.0, -3.0]], [[2.0, -1.0]], [[float("nan"), 9.0]]])
    assert largest(x)[:2].tolist() == [3, 2]
    assert largest(x)[2].isnan()


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
            q = procrustes(q, normal(B, 32, 6, seed=step), IEEE)
        assert bool((torch.linalg.matrix_norm(q - q.mT) < 1e-3 * torch.linalg.matrix_norm(q)).all())
        assert torch.allclose(q.mT @ q, turned.mT @ turned, rtol=0.02, atol=0.02 * float(turned.square().amax()))
        assert torch.allclose(q, symmetric, rtol=0.02, atol=0.02 * float(symmetric.amax()))

    def test_a_step_turns_by_an_eighth_at_most(self):
        q = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]], dtype=torch.float64)  # a quarter turn from the identity
        turn = procrustes(q, normal(1, 32, 2), IEEE) @ q.mT  # = exp(a R), R a rotation's generator
        angle = torch.atan2(turn[0, 1, 0], turn[0, 0, 0]).abs()
        assert float(angle) == pytest.approx(LARGEST_TURN, rel=1e-2)

    @pytest.mark.parametrize("q", [torch.zeros(2, 3, 3), torch.eye(3).expand(2, 3, 3)], ids=["zeros", "identity"])
    def test_symmetric_matrices_stay(self, q):
        assert torch.equal(procrustes(q, torch.ones(2, 32, 3), IEEE), q)
