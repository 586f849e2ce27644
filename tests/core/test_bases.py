"""Eigenbases and changes of basis, against the same in plain words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core.kit import normal

from hbcore.rules import bases as basis
from hbcore.rules.products import IEEE, Split

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.float64]


def orthogonal(*shape, seed=0, dtype=torch.float64):
    return torch.linalg.qr(normal(*shape, seed=seed))[0].to(dtype)


def spectrum(values, seed=0, dtype=torch.float64):
    """One symmetric matrix ``[1, n, n]`` with these eigenvalues."""
    q = orthogonal(len(values), len(values), seed=seed)
    return ((q * torch.tensor(values, dtype=torch.float64)) @ q.T).to(dtype)[None]


def defect(q):
    """How far the columns are from orthonormal."""
    q = q.double()
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=torch.float64)).abs().max())


def test_a_matrix_is_projected_from_both_sides():
    x, left, right = normal(3, 4, 6), orthogonal(3, 4, 4, seed=1), orthogonal(3, 6, 6, seed=2)
    both = torch.stack([q.T @ a @ p for a, q, p in zip(x, left, right, strict=True)])
    assert torch.allclose(basis.project(x, [left, right]), both, atol=1e-14)
    assert torch.allclose(basis.project(x, [left, None]), left.mT @ x, atol=1e-14)
    assert torch.allclose(basis.project(x, [None, right]), x @ right, atol=1e-14)
    assert basis.project(x, [None, None]) is x


@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 3, 4), (3, 2, 4, 5)], ids=str)
@pytest.mark.parametrize("skipped", [None, 0], ids=["all", "but-one"])
def test_projecting_back_undoes_projecting(shape, skipped):
    x = normal(2, *shape)
    bases = [None if i == skipped else orthogonal(2, n, n, seed=i) for i, n in enumerate(shape)]
    letters = "abcd"[: len(shape)]
    wanted = x
    for i, q in enumerate(bases):
        if q is not None:
            wanted = torch.einsum(f"z{letters},z{letters[i]}y->z{letters.replace(letters[i], 'y')}", wanted, q)
    there = basis.project(x, bases)
    assert torch.allclose(there, wanted, atol=1e-13)
    assert torch.allclose(basis.project_back(there, bases), x, atol=1e-13)


@pytest.mark.parametrize("dim", range(4))
def test_a_factor_averages_the_unfolding_times_itself(dim):
    x = normal(2, 3, 2, 4, 5)
    letters = "abcd"
    other = letters.replace(letters[dim], "y")
    wanted = torch.einsum(f"z{letters},z{other}->z{letters[dim]}y", x, x)
    mean = normal(*wanted.shape, seed=1)
    assert torch.allclose(basis.averaged(mean, x, dim, 0.75), 0.75 * mean + 0.25 * wanted, atol=1e-13)


def test_the_factor_of_a_vector():
    x = normal(2, 3)
    assert torch.equal(basis.averaged(torch.zeros(2, 3, 3, dtype=x.dtype), x, 0, 0.0), x[:, :, None] * x[:, None, :])


def test_a_solver_that_returns_nan_runs_again_in_float64(monkeypatch):
    """LAPACK's returned NaN for an embedding's second moments, finite and symmetric, most of whose rows are zeros."""
    p, solve = torch.stack([spectrum([3, 2, 1], dtype=torch.float32)[0]] * 3), torch.linalg.eigh

    def fails(matrices):
        values, vectors = solve(matrices)
        if matrices.dtype == torch.float32:
            vectors[1] = float("nan")
        return values, vectors

    wanted = basis.eigenbasis(p)
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert torch.allclose(basis.eigenbasis(p).abs(), wanted.abs(), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_eigenbasis_is_orthonormal_and_sorted(dtype):
    p = torch.cat([spectrum([4, 1, 9, 2], seed=s, dtype=dtype) for s in range(3)])
    q = basis.eigenbasis(p)
    values = q.mT @ p @ q
    assert q.dtype == dtype
    assert defect(q) < 1e-5
    assert torch.allclose(values, torch.diag(torch.tensor([9.0, 4, 2, 1], dtype=dtype)).expand(3, 4, 4), atol=1e-5)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_known_gives_unit_vectors_to_that_matrix_alone(value):
    p = torch.cat([torch.full((1, 4, 4), value, dtype=torch.float64), spectrum([4, 3, 2, 1])])
    q = basis.eigenbasis(p)
    assert torch.equal(q[0].abs().sort(0).values, torch.eye(4, dtype=torch.float64).sort(0).values)
    assert torch.equal(q[1:], basis.eigenbasis(p[1:]))


def test_float64_takes_over_where_the_solver_fails(monkeypatch):
    solver, seen = torch.linalg.eigh, []

    def fails_in_float32(p):
        seen.append(p.dtype)
        if p.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return solver(p)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    q = basis.eigenbasis(spectrum([3, 2, 1], dtype=torch.float32))
    assert seen == [torch.float32, torch.float64]
    assert q.dtype == torch.float32 and defect(q) < 1e-6


@pytest.fixture(params=["library", "products"])
def way(request, monkeypatch):
    """As on a CPU, and as on a GPU."""
    if request.param == "products":
        monkeypatch.setattr(basis, "orthonormal", basis.cholesky_qr)


def test_a_refresh_is_qr_of_the_sorted_image(way):
    p, q = spectrum([5, 4, 3, 2, 1]), orthogonal(1, 5, 5, seed=7)
    fresh = basis.refreshed(p, q)
    order = (q.mT @ p @ q)[0].diagonal().argsort(descending=True)
    assert not torch.equal(order, order.sort().values)
    wanted = torch.linalg.qr(p[0] @ q[0][:, order])[0]
    signs = (fresh[0][:, order] * wanted).sum(0)
    assert torch.allclose(signs.abs(), torch.ones_like(signs), atol=1e-12)
    assert torch.allclose(fresh[0][:, order] * signs, wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refreshes_find_the_eigenvectors(dtype, way):
    p, q = spectrum([16, 8, 4, 2, 1], dtype=dtype), orthogonal(1, 5, 5, seed=7, dtype=dtype)
    for _ in range(60):  # each halves what the columns have of their neighbours: 16 / 2**60 is far below rounding
        q = basis.refreshed(p, q)
    values = q.mT @ p @ q
    wanted = torch.tensor([1, 2, 4, 8, 16], dtype=dtype)
    near = 1e-4 if dtype == torch.float32 else 1e-11
    assert torch.allclose(values[0].diagonal().sort().values, wanted, atol=near)
    assert torch.allclose(values, torch.diag_embed(values.diagonal(dim1=-2, dim2=-1)), atol=near)


SPECTRA = {
    "condition-1e8": [10 ** (-8 * i / 95) for i in range(96)],
    "one-direction": [1.0] + [0.0] * 95,
    "half-rank": [1.0] * 48 + [0.0] * 48,
    "zero": [0.0] * 96,
    "tiny": [1e-36] * 96,
    "huge": [1e36 * 0.9**i for i in range(96)],
}


@pytest.mark.parametrize("start", ["random", "eigenvectors"])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_refreshed_basis_is_orthonormal_whatever_the_spectrum(dtype, name, start, way):
    p = spectrum(SPECTRA[name], dtype=dtype)
    q = orthogonal(1, 96, 96, seed=5, dtype=dtype) if start == "random" else basis.eigenbasis(p)
    fresh = basis.refreshed(p, q)
    assert fresh.dtype == dtype
    near = 1e-13 if dtype == torch.float64 else 1e-4 if start == "random" else 1e-5  # a run starts from eigenvectors
    assert defect(fresh) < near


def test_directions_that_the_gradients_never_showed_stay_about_where_they_are(way):
    q = basis.eigenbasis(spectrum([4, 3, 2, 1, 0.5, 0.2]))
    p = (q[:, :, :2] * torch.tensor([3.0, 1.0], dtype=torch.float64)) @ q[:, :, :2].mT
    fresh = basis.refreshed(p, q)
    moved = (fresh.mT @ q).abs()
    assert torch.allclose(moved, torch.eye(6, dtype=torch.float64)[None], atol=0.1)


def test_steep_spectra_converge_as_fast_as_with_qr(way):
    """A shift that is not tiny would hold back the small eigenvalues."""
    p, q = spectrum([10.0**-i for i in range(7)]), orthogonal(1, 7, 7, seed=3)
    plain = q
    for _ in range(3):
        q = basis.refreshed(p, q)
        columns = (plain.mT @ p @ plain)[0].diagonal().argsort(descending=True)
        plain = torch.linalg.qr(p @ plain[:, :, columns])[0][:, :, columns.argsort()]
    assert torch.allclose((q.mT @ plain).abs(), torch.eye(7, dtype=torch.float64)[None], atol=1e-7)


def test_a_matrix_that_is_not_finite_keeps_its_basis(way):
    q = orthogonal(2, 4, 4)
    p = spectrum([4, 3, 2, 1]).repeat(2, 1, 1)
    alone = basis.refreshed(p[1:], q[1:])
    p[0, 1, 2] = float("nan")
    fresh = basis.refreshed(p, q)
    assert torch.equal(fresh[0], q[0])
    assert torch.allclose(fresh[1:], alone, atol=1e-14)


def definite(n, count=2, seed=0, dtype=torch.float64):
    x = normal(count, n, 2 * n, seed=seed)
    return (x @ x.mT / (2 * n) + 0.1 * torch.eye(n, dtype=torch.float64)).to(dtype)


HALVED = [(128, 127), (128, 128), (128, 129), (128, 300), *((8, n) for n in (1, 7, 8, 9, 16, 17, 24, 25, 31, 65))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block", "n"), HALVED)
def test_the_inverse_of_a_factor_is_made_of_those_of_its_halves(monkeypatch, block, n, dtype):
    monkeypatch.setattr(basis, "BLOCK", block)
    p = definite(n, dtype=dtype)
    wanted = np.linalg.inv(np.linalg.cholesky(p.double().numpy()))
    found, worked = basis.inverse_factor(p.tril() + 1e9 * torch.ones_like(p).triu(1))  # one half is read
    assert found.dtype == dtype and worked.tolist() == [True, True]
    assert torch.equal(found, found.tril())
    near = 1e-12 if dtype == torch.float64 else 1e-5
    assert np.abs(found.double().numpy() - wanted).max() < near * np.abs(wanted).max()


@pytest.mark.parametrize("value", [-5.0, float("nan")])
@pytest.mark.parametrize("place", [0, 4, 10, 18, 24])
def test_a_matrix_that_has_no_factor_is_flagged_and_no_other(monkeypatch, place, value):
    monkeypatch.setattr(basis, "BLOCK", 8)
    p = definite(25, count=3)
    alone, _ = basis.inverse_factor(p[[0, 2]].clone())
    p[1, place, place] = value
    found, worked = basis.inverse_factor(p)
    assert worked.tolist() == [True, False, True]
    assert torch.allclose(found[[0, 2]], alone, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bases_above_the_size_that_is_factorized_at_once_are_orthonormal(dtype):
    q, good = basis.cholesky_qr(definite(200, dtype=dtype))
    assert good.all() and defect(q) < (1e-13 if dtype == torch.float64 else 1e-5)


FACTORS = {
    "one stack": [(5, 4)],
    "several of a size": [(2, 4), (3, 4), (1, 4)],
    "several sizes": [(3, 4), (2, 6), (4, 4), (1, 2), (2, 6), (1, 1)],
    "an empty one": [(0, 4), (2, 4)],
}


def factors(counts, dtype=torch.float64):
    seeded = [(count, n, 9 + k, dtype) for k, (count, n) in enumerate(counts)]
    return [
        (definite(n, count, seed, dtype), orthogonal(count, n, n, seed=seed, dtype=dtype)) for count, n, seed, dtype in seeded
    ]


@pytest.mark.parametrize("solver", ["qr", "eigh"])
@pytest.mark.parametrize("chunk", [1, 16, 40, 2**24])
@pytest.mark.parametrize("name", FACTORS)
def test_refreshing_all_is_refreshing_each(monkeypatch, name, chunk, solver):
    given, heard, orthonormal = factors(FACTORS[name]), [], basis.orthonormal
    wanted = [
        torch.cat([basis.refreshed(p[i : i + 1], q[i : i + 1], IEEE, solver) for i in range(len(p))] or [q]) for p, q in given
    ]

    def told(y, products):
        heard.append(y.shape)
        return orthonormal(y, products)

    monkeypatch.setattr(basis, "orthonormal", told)
    monkeypatch.setattr(basis, "TOGETHER", chunk)
    found = basis.all_refreshed(given, IEEE, solver)
    assert [q.shape for q in found] == [q.shape for _, q in given]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    assert all(count == 1 or count * n * n <= chunk for count, n, _ in heard)
    for n in {n for _, n in FACTORS[name]} if solver == "qr" else ():
        rows = sum(count for count, m in FACTORS[name] if m == n)
        assert sum(count for count, m, _ in heard if m == n) == rows
        assert sum(m == n for _, m, _ in heard) <= -(-rows // max(1, chunk // n**2))


def test_factors_of_two_dtypes_are_not_worked_on_together():
    counts = [(2, 5), (3, 5)]
    single, double = factors(counts, torch.float32), factors(counts)
    found = basis.all_refreshed([single[0], double[1], double[0], single[1]])
    wanted = basis.all_refreshed(single) + basis.all_refreshed(double)
    for i, j in ((0, 0), (3, 1), (2, 2), (1, 3)):
        assert found[i].dtype == wanted[j].dtype
        torch.testing.assert_close(found[i], wanted[j])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_that_is_not_finite_keeps_its_basis_among_all(value):
    given = factors([(2, 4), (2, 4)])
    usual = basis.all_refreshed(given)
    given[1][0][0, 1, 1] = value
    found = basis.all_refreshed(given)
    assert torch.equal(found[1][0], given[1][1][0])
    assert torch.allclose(found[0], usual[0], atol=1e-13) and torch.allclose(found[1][1], usual[1][1], atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_exact_solver_gives_eigenvectors_and_leaves_each_in_its_column(dtype):
    p = spectrum([9, 7, 4, 2, 1], dtype=dtype)
    exact, places = basis.eigenbasis(p), torch.tensor([3, 0, 4, 2, 1])
    near = torch.linalg.qr(exact[:, :, places].double() + 0.05 * normal(1, 5, 5, seed=3))[0].to(dtype)
    found = basis.refreshed(p, near, solver="eigh")
    alike = (found.mT @ exact).abs()
    assert torch.allclose(alike, torch.eye(5, dtype=dtype)[places][None], atol=1e-5)
    assert torch.equal(basis.refreshed(p / 0.0, near, solver="eigh"), near)


def test_products_are_made_as_asked():
    p, q = spectrum(SPECTRA["half-rank"], dtype=torch.float32), orthogonal(1, 96, 96, seed=5, dtype=torch.float32)
    usual, split, [both] = basis.refreshed(p, q), basis.refreshed(p, q, Split()), basis.all_refreshed([(p, q)], Split())
    assert torch.equal(split, both) and not torch.equal(usual, split) and defect(split) < 1e-4


def test_the_kernel_takes_what_is_factorized_at_once():
    kernel = pytest.importorskip("hbcore.rules.factor_kernel", exc_type=ImportError)
    assert basis.BLOCK <= 2 * kernel.HALF
