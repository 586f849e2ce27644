"""Orthogonal factors: how close to orthogonal, the same for stacks as one by one, and finite for every input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.minimax import minimax as minimax_oracle
from reference.minimax import table as minimax_table
from reference.muon import JORDAN, YOU, newton_schulz, polar
from rounding import unit

from hb_muon.coefficients import MINIMAX
from hb_muon.orthogonalize import METHODS, TABLES, orthogonalize, orthogonalize_stacks, polar_express, table

SHAPES = ((24, 24), (16, 40), (40, 16), (3, 64), (64, 3))
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_TABLE = pytest.mark.parametrize("coefficients", TABLES)


def matrix(m, n, condition=None, seed=0, dtype=torch.float64):
    """A random matrix; with ``condition``, one whose singular values run geometrically from 1 to ``1 / condition``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=generator, dtype=torch.float64)
    if condition is not None:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        x = (u * condition ** -torch.linspace(0, 1, len(s), dtype=torch.float64)) @ vt
    return x.to(dtype)


def of_spectrum(kind, n, k):
    """A matrix of condition number 100 and of one of three spectra: geometric, linear, and all equal but the last."""
    u, v = (torch.linalg.qr(matrix(side, n, seed=side))[0] for side in (n, k))
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    values = {"geometric": 100**-t, "linear": 1 - 0.99 * t, "one small": torch.where(t == 1, 0.01, 1.0)}[kind]
    return (u * values) @ v.mT


def stack(count, m, n, dtype=torch.float64):
    return torch.stack([matrix(m, n, seed=i) for i in range(count)]).to(dtype)


@pytest.mark.parametrize("condition", [1, 10, 100])
@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (96, 32), (120, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@EVERY_METHOD
def test_singular_values_come_close_to_1(method, shape, condition, dtype):
    out = orthogonalize(matrix(*shape, condition, dtype=dtype), method)
    values = torch.linalg.svdvals(out.double())
    assert out.shape == shape
    assert values.min() > 0.68
    assert values.max() < 1.3


@pytest.mark.parametrize(
    ("coefficients", "steps", "low", "high"),
    [("jordan", 5, 0.68, 1.21), ("you", 5, 0.85, 1.15), ("polar_express", 5, 0.87, 1.13), ("polar_express", 7, 0.999, 1.001)],
)
def test_what_a_table_makes_of_singular_values(coefficients, steps, low, high):
    sigma = torch.linspace(0.002, 1, 1000, dtype=torch.float64)
    pairs = torch.diag_embed(torch.stack((sigma, (1 - sigma**2).sqrt()), dim=-1))  # of norm 1: normalising changes nothing
    reached = orthogonalize(pairs, ns_coefficients=coefficients, ns_steps=steps)[:, 0, 0]
    assert reached.min() > low
    assert reached.max() < high


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5, 8])
@pytest.mark.parametrize(("name", "rows"), [("jordan", JORDAN), ("you", YOU)])
def test_the_iteration_agrees_with_its_oracle(name, rows, steps, shape):
    x = matrix(*shape)
    ours = orthogonalize(x, ns_steps=steps, ns_coefficients=name)
    torch.testing.assert_close(ours, torch.tensor(newton_schulz(x.numpy(), rows, steps)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [*SHAPES, (20, 24), (1, 1), (5, 1)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e4])
def test_minimax_agrees_with_its_oracle(size, steps, shape):
    x = matrix(*shape) * size
    expected = minimax_oracle(x.numpy(), MINIMAX, steps)
    ours = orthogonalize(x, "minimax", ns_steps=steps, eps=1e-12)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=0, atol=1e-10)


def test_the_minimax_rows_are_optimal():
    """Four of them by another algorithm; and what they leave of [0.0036, 1], with a step in between the singular values."""
    for ours, theirs in zip(MINIMAX[:4], minimax_table(0.0035, 4, 1.01, (0.06, 0.06)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    s = np.geomspace(0.0036, 1, 100_001)
    for a, b, c in MINIMAX[:4]:
        s = a * s + b * s**3 + c * s**5
    assert 0.8 < s.min() < s.max() < 1.19


@pytest.mark.parametrize("spectrum", ["geometric", "linear", "one small"])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (128, 512), (256, 320), (256, 1024)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_minimax_reaches_every_spectrum_of_condition_100(dtype, n, k, spectrum):
    """The rows take it to [0.80, 1.19]; four steps of four roundings each, whose errors add up as a root, a little further."""
    x, rounding = of_spectrum(spectrum, n, k), (4 * 4) ** 0.5 * unit(dtype)
    for given in (x, x.mT):
        values = torch.linalg.svdvals(orthogonalize(given.bfloat16(), "minimax", dtype=dtype).double())
        assert 0.8 * (1 - rounding) < values.min() < values.max() < 1.19 * (1 + rounding)


@pytest.mark.broad  # a minute each: a CPU multiplies float16 slowly
@pytest.mark.parametrize("spectrum", ["linear", "one small"])
def test_the_frobenius_norm_is_too_far_from_large_matrices(spectrum):
    """What :func:`minimax` is for: five steps from the Frobenius norm do not suffice for a side of 1,024, four of it do."""
    x = of_spectrum(spectrum, 1024, 1024)[None].bfloat16()
    ranges = {}
    for method in METHODS:
        if method != "exact":
            factor = orthogonalize(x, method)[0].double()
            values = torch.linalg.eigvalsh(factor @ factor.mT).clamp(min=0).sqrt()
            ranges[method] = values.min().item(), values.max().item()
    assert ranges["newton_schulz"][0] < 0.3
    assert ranges["gram_newton_schulz"][0] < 0.6
    assert 0.8 < ranges["minimax"][0] < ranges["minimax"][1] < 1.2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 6), (6, 9), (9, 6), (4, 16), (16, 4)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_scale_is_a_factor(steps, shape, method):
    x = stack(2, *shape)
    scaled = orthogonalize(x, method, steps, scale=0.3)
    torch.testing.assert_close(scaled, 0.3 * orthogonalize(x, method, steps), rtol=0, atol=1e-12)


def test_no_steps_are_an_error():
    for method in ("newton_schulz", "gram_newton_schulz", "minimax"):
        with pytest.raises(ValueError, match="ns_steps=0 must be at least 1"):
            orthogonalize(matrix(3, 4), method, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_exact_factor_agrees_with_its_oracle(shape):
    x = matrix(*shape)
    torch.testing.assert_close(orthogonalize(x, "exact"), torch.tensor(polar(x.numpy())), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
@EVERY_TABLE
def test_gram_equals_plain_newton_schulz(coefficients, steps, shape):
    x = stack(3, *shape)
    plain = orthogonalize(x, ns_steps=steps, ns_coefficients=coefficients)
    gram = orthogonalize(x, "gram_newton_schulz", steps, coefficients)
    torch.testing.assert_close(gram, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(4, 4), (6, 10), (10, 6), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@EVERY_METHOD
def test_a_stack_equals_its_matrices_one_by_one(method, dtype, shape):
    for count in (1, 2, shape[0], shape[1]):  # a stack as deep as its matrices are wide is no matrix of matrices
        x = stack(count, *shape, dtype=dtype) * torch.logspace(-3, 3, count, dtype=dtype).view(-1, 1, 1)
        together = orthogonalize(x, method, dtype=dtype)
        apart = torch.stack([orthogonalize(row, method, dtype=dtype) for row in x])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)
        torch.testing.assert_close(orthogonalize(x[None, :, None], method, dtype=dtype)[0, :, 0], together, rtol=0, atol=0)


@EVERY_METHOD
def test_a_tall_matrix_is_its_wide_transpose(method):
    for shape in SHAPES:
        x = stack(2, *shape)
        torch.testing.assert_close(orthogonalize(x, method), orthogonalize(x.mT, method).mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 5), (4, 7), (7, 4), (1, 6), (6, 1), (1, 1)], ids=str)
@EVERY_METHOD
def test_degenerate_matrices(method, shape, dtype):
    zero = torch.zeros(shape, dtype=dtype)
    assert torch.equal(orthogonalize(zero, method), torch.zeros_like(orthogonalize(zero, method)))
    outer = torch.ones(shape, dtype=dtype)
    single = zero.clone()
    single[0, 0] = 1e-4
    for rank_one in (outer, outer * 300, single):
        out = orthogonalize(torch.stack([rank_one, zero]), method).double()
        assert out.isfinite().all()
        assert out[1].abs().max() == 0
        expected = rank_one.double() / rank_one.double().norm()
        assert (out[0] - expected).norm() < 0.2  # one singular value, close to 1


def test_the_size_of_a_matrix_does_not_matter_until_eps():
    x = matrix(6, 9, dtype=torch.float32)
    for size in (1e-6, 1e6):  # far outside what float16 holds
        for method in METHODS:
            torch.testing.assert_close(orthogonalize(x * size, method), orthogonalize(x, method), rtol=0, atol=0.01)
    for method in ("newton_schulz", "gram_newton_schulz", "minimax"):
        tiny = x.double() / x.double().norm() * 1e-12
        assert orthogonalize(tiny, method, eps=1e-3).norm() < 1e-6
        assert orthogonalize(tiny[None].float(), method, eps=1e-3).isfinite().all()
    assert torch.equal(orthogonalize(x, eps=torch.tensor(50.0, dtype=torch.float64)), orthogonalize(x, eps=50.0))


def test_the_dtype_of_the_iteration():
    x = matrix(8, 12, dtype=torch.float32)
    assert orthogonalize(x).dtype == torch.bfloat16
    assert orthogonalize(x, "gram_newton_schulz").dtype == torch.float16
    assert orthogonalize(x, "exact").dtype == torch.float32
    assert {orthogonalize(x.double(), method).dtype for method in METHODS} == {torch.float64}
    fine = orthogonalize(x, dtype=torch.float32)
    exact = orthogonalize(x.double())
    assert (fine - exact).norm() < 1e-5
    assert (orthogonalize(x) - exact).norm() > 1e-4


def test_coefficients_in_every_spelling():
    one = (3.4445, -4.7750, 2.0315)
    assert table("jordan") == table([one] * 5) == (one,) * 5
    assert table(one) == table(list(one)) == (one,)
    assert table(np.array(one).tolist()) == (one,)
    assert polar_express(1.0)[1] == (4.107059111542203, -2.9478499167379106, 0.5448431082926601)
    assert polar_express(2.0)[-1] == (1.875, -1.25, 0.375)
    x = matrix(5, 7)
    assert torch.equal(orthogonalize(x, ns_coefficients=one), orthogonalize(x, ns_coefficients="jordan"))


@pytest.mark.parametrize("coefficients", ["jordon", (1.0, 2.0), (), ((1.0, 2.0),), (1.0, 2.0, 3.0, 4.0)], ids=str)
def test_coefficients_that_do_not_exist(coefficients):
    with pytest.raises(ValueError, match="ns_coefficients="):
        orthogonalize(matrix(3, 4), ns_coefficients=coefficients)


def test_a_method_that_does_not_exist():
    with pytest.raises(
        ValueError, match=r"method='svd' does not exist; pass one of newton_schulz, gram_newton_schulz, minimax"
    ):
        orthogonalize(matrix(3, 4), "svd")


def test_nothing_is_written():
    for method in METHODS:
        for dtype in (torch.float64, torch.bfloat16):
            x = stack(2, 4, 6, dtype)
            before, version = x.clone(), x._version
            orthogonalize(x, method, dtype=dtype)
            assert torch.equal(x, before)
            assert x._version == version


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@EVERY_METHOD
def test_stacks_of_several_shapes_equal_each_by_itself(method, dtype):
    """Two smaller sides, wide and tall ones of each, in no order; the scale goes with the stack."""
    stacks = [stack(*shape) for shape in [(3, 6, 9), (1, 4, 4), (2, 9, 6), (2, 4, 11), (1, 6, 6), (1, 1, 1)]]
    scales = [1.0, 0.5, 2.0, 1.0, 3.0, 1.0]
    together = list(orthogonalize_stacks(stacks, method, dtype=dtype, scales=scales))
    for x, scale, factor in zip(stacks, scales, together, strict=True):
        assert factor.shape == x.shape
        alone = orthogonalize(x, method, dtype=dtype, scale=scale)
        torch.testing.assert_close(factor, alone, rtol=0, atol=1e-12 if dtype == torch.float64 else 0)


def test_no_stacks():
    for method in METHODS:
        assert list(orthogonalize_stacks([], method)) == []
