"""The building blocks of Kronecker-factored preconditioners, each against a formula that is written out."""

from __future__ import annotations

import pytest
import torch
from core.kit import normal

from hb_psgd import kron
from hb_psgd.fitting import Portion, settle
from hb_psgd.kron import begin, gram, memory_layout, multiply, precondition, second_moments, whitening_scale
from hbcore.errors import OptionError
from hbcore.rules.products import IEEE, Split

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
@pytest.mark.parametrize("shape", [(3, 4, 2), (20, 2, 3), (2, 3, 20), (5, 5, 2)], ids=str)
def test_q_and_p_are_kronecker_products(shape, dense):
    x, factors = normal(B, *shape, seed=9), factors_for(shape, dense)
    root, twice = multiply(x, factors, IEEE), precondition(x, factors, IEEE)
    out = torch.empty_like(x)
    kept = precondition(x, factors, IEEE, [gram(q, IEEE) if i != 1 else None for i, q in enumerate(factors)], out)
    for b in range(B):
        q = torch.ones(1, 1, dtype=torch.float64)
        for f in factors:
            q = torch.kron(q, f[b] if f.ndim == 3 else torch.diag(f[b]))
        assert torch.allclose(root[b].flatten(), q @ x[b].flatten(), rtol=1e-11)
        assert torch.allclose(twice[b].flatten(), q.mT @ q @ x[b].flatten(), rtol=1e-11)
        assert torch.allclose(kept[b].flatten(), q.mT @ q @ x[b].flatten(), rtol=1e-11)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dense", [(True, True), (False, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("shape", [(6, 5), (3, 20), (20, 3)], ids=str)
def test_split_products_take_diagonal_factors_along_and_write_over_the_stack(shape, dense, kept):
    x, factors = normal(B, *shape, seed=9).float(), [q.float() for q in factors_for(shape, dense)]
    p = [gram(q, IEEE) if kept and q.ndim == 3 else None for q in factors]
    results = multiply(x, factors, IEEE), precondition(x, factors, IEEE, p)
    for wanted, function in zip(results, (multiply, lambda *given: precondition(*given[:3], p, given[3])), strict=True):
        memory = x.clone()
        made = function(memory, factors, Split(), memory)
        assert made.data_ptr() == memory.data_ptr()
        assert torch.allclose(made, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_second_moments_are_sums_over_the_other_dimensions():
    x = normal(B, 3, 4, 2)
    for i, formula in enumerate(["zabc,zdbc->zad", "zabc,zadc->zbd", "zabc,zabd->zcd"]):
        whole = torch.einsum(formula, x, x)
        assert torch.allclose(second_moments(x, i, True, IEEE), whole, rtol=1e-12)
        assert torch.allclose(second_moments(x, i, False, IEEE), whole.diagonal(dim1=1, dim2=2), rtol=1e-12)
    assert torch.equal(second_moments(x[:, :, 0, 0], 0, False, IEEE), x[:, :, 0, 0] ** 2)
    one = x[:, :, 0, 0]
    assert torch.allclose(second_moments(one, 0, True, IEEE), one[:, :, None] * one[:, None], rtol=1e-12)


@pytest.mark.parametrize("n", [5, 8])
def test_three_quarters_of_a_symmetric_matrix_are_enough(monkeypatch, n):
    monkeypatch.setattr(kron, "QUARTERED", 8)
    q, computed = normal(B, n, n), []

    def part(rows, columns):
        computed.append((rows.stop - rows.start) * (columns.stop - columns.start))
        return q[:, :, rows].mT @ q[:, :, columns]

    made = kron.symmetric(q, part)
    assert torch.allclose(made, q.mT @ q, rtol=1e-12)
    assert torch.equal(made, made.mT)
    assert sum(computed) == (n * n if n < 8 else 3 * n * n // 4)
    assert torch.equal(gram(q, IEEE), kron.symmetric(q, lambda rows, columns: q[:, :, rows].mT @ q[:, :, columns]))


class TestSettled:
    """hb_psgd.fitting.settle."""

    BOUND = torch.arange(B, dtype=torch.float64)

    def settle(self, old, new, bounds=None):
        bounds = [self.BOUND] * len(new) if bounds is None else bounds
        portions = [
            Portion([(k, slice(0, B))], *(x.clone() for x in each)) for k, each in enumerate(zip(old, new, bounds, strict=True))
        ]
        risen = settle(portions, [range(len(new))], [self.BOUND - 9] * len(new))
        return [portion.new for portion in portions], risen

    def test_largest_elements_become_equal_and_the_preconditioner_stays(self):
        x, factors = normal(B, 4, 3, 5), factors_for((4, 3, 5), (True, False, True))
        uneven = [factors[0] * 1e12, factors[1] * 1e-9, factors[2]]
        even, bounds = self.settle(factors, uneven)
        sizes = torch.stack([q.abs().flatten(1).amax(-1) for q in even])
        assert torch.allclose(sizes, sizes[0].expand_as(sizes), rtol=1e-12)
        assert torch.allclose(precondition(x, even, IEEE), precondition(x, uneven, IEEE), rtol=1e-9)
        assert all(torch.equal(b, self.BOUND) for b in bounds)

    def test_zeros_stay(self):
        factors = [torch.zeros(B, 2, 2), torch.zeros(B, 3)]
        assert all(torch.equal(a, b) for a, b in zip(self.settle(factors, factors)[0], factors, strict=True))

    @pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
    @pytest.mark.parametrize("where", ["dense", "diagonal", "bound"])
    def test_a_block_that_overflowed_anywhere_stays_whole_as_it_was(self, bad, where):
        old, new = factors_for((4, 3), (True, False)), factors_for((4, 3), (True, False), seed=5)
        bounds = [self.BOUND.clone(), self.BOUND]
        {"dense": new[0][1, 2], "diagonal": new[1][1], "bound": bounds[0][1:2]}[where][0] = bad
        kept, risen = self.settle(old, new, bounds)
        for q, before, after in zip(kept, old, new, strict=True):
            assert torch.equal(q[1], before[1])
            assert not torch.equal(q[0], before[0]) and q[0].isfinite().all()
            assert torch.allclose(q[2] / q[2].abs().amax(), after[2] / after[2].abs().amax(), rtol=1e-12)
        assert risen[0].tolist() == risen[1].tolist() == [0, 1 - 9, 2]


class TestWhiteningScale:
    """whitening_scale."""

    def test_the_formula(self):
        x = normal(B, 30, 20) * torch.tensor([1e-3, 1.0, 0.0], dtype=torch.float64).view(B, 1, 1)
        scale = whitening_scale(x, 1e-9)
        assert scale[2] == 0
        assert torch.allclose(scale[:2], x[:2].pow(4).mean((1, 2)) ** (-1 / 8), rtol=1e-12)
        assert float(whitening_scale(torch.full((1, 2), 1e-12), 1e-9)) == pytest.approx(1e9**0.5, rel=1e-3)
        assert float(whitening_scale(torch.full((1, 2), 1e-12), 0.0)) == pytest.approx(1e12**0.5, rel=1e-3)

    @pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-12, 1e18, 1e25, 3e38])
    def test_every_size_of_float32_has_a_scale(self, size):
        x = normal(1, 6, 4, dtype=torch.float32).clamp(-1, 1) * size
        for dampening in (0.0, 1e-9):
            wanted = float((x.double().pow(4).mean() + dampening**4) ** (-1 / 8))
            assert float(whitening_scale(x, dampening)) == pytest.approx(wanted, rel=1e-5)

    @pytest.mark.parametrize("size", [1e-200, 1e200])
    def test_so_has_float64(self, size):
        assert float(whitening_scale(torch.full((1, 2), size, dtype=torch.float64), 1e-9)) == pytest.approx(
            max(size, 1e-9) ** -0.5, rel=1e-9
        )

    def test_what_is_not_finite_has_none(self):
        x = torch.ones(3, 2, 2)
        x[0, 0, 0], x[1, 1, 1] = float("inf"), float("nan")
        assert whitening_scale(x, 1e-9).tolist() == [0, 0, 1]


def test_begin_adds_multiples_of_the_identity():
    factors = [torch.zeros(B, 4, 4).double(), torch.zeros(B, 3).double()]
    factors[0][1], factors[1][1] = normal(4, 4), normal(3)
    before = [q.clone() for q in factors]
    dense, diagonal = begin(factors, torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64))
    assert torch.equal(dense[1], before[0][1]) and torch.equal(diagonal[1], before[1][1])
    assert torch.equal(dense[0], 2 * torch.eye(4, dtype=torch.float64))
    assert torch.equal(diagonal[2], torch.full((3,), 0.5, dtype=torch.float64))
    assert all(torch.equal(q, b) for q, b in zip(factors, before, strict=True))
