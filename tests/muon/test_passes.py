"""The passes over stacks: the kernels against torch's operations, and both against the formula."""

from __future__ import annotations

import pytest
import torch
from rounding import unit

from hb_muon.coefficients import MINIMAX
from hb_muon.minimax import TRACE, factor_of
from hb_muon.passes import begun, normalized

ROW = (2.5, -1.75, 0.375)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def stack(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def close(dtype):
    """One unit in the last place, which is the most that cutting off, as Triton's interpreter does, and rounding differ by.

    Besides, sums are added in another order in float32.
    """
    return {"rtol": {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype, 1e-5), "atol": 1e-6}


@pytest.fixture
def kernels():
    pytest.importorskip("triton")
    from hb_muon import passes_kernel
    from hbcore.api import launching

    if not (launching.INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs Triton's interpreter or a GPU")
    return passes_kernel


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 64, 96), (1, 1, 4097), (2, 200, 300)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernel_normalizes_as_torch_does(kernels, shape, dtype):
    x, out = stack(shape), torch.empty(shape, dtype=dtype, device=DEVICE)
    for least in (0.7, 1e4):
        kernels.launch_divide(out, x, least, 3.0)
        torch.testing.assert_close(out, normalized(x, least, 3.0, dtype), **close(dtype))


@pytest.mark.parametrize("numel", [1, 4096, 5000, 300_000])
def test_every_square_is_added_once(kernels, numel):
    x = torch.arange(numel, device=DEVICE).remainder(7).float().view(1, 1, -1).expand(3, 1, numel).contiguous()
    assert torch.equal(kernels.sums_of(x).sum(1), x.square().sum((1, 2)))  # of whole numbers, exact


@pytest.mark.parametrize(("count", "side"), [(3, 5), (2, 67), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernel_begins_as_torch_does(kernels, count, side, dtype):
    square, gram = stack((count, side, side), dtype), stack((count, side, side), dtype).mT.contiguous()
    ours = [gram.clone(), square.clone()]
    expected = begun(gram, square, 0.7, ROW)
    out = torch.empty_like(gram)
    kernels.launch_begin(out, *ours, 0.7, ROW)
    for mine, theirs in zip((out, *ours), (expected, gram, square), strict=True):
        torch.testing.assert_close(mine, theirs, **close(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalized(dtype):
    x = stack((2, 3, 4), torch.float64)
    for least in (0.7, 50.0, torch.tensor(50.0, dtype=torch.float64)):
        expected = (3 * x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=float(least))).to(dtype)
        rtol = 1e-12 if dtype == torch.float64 else 0.01
        torch.testing.assert_close(normalized(x, least, 3.0, dtype), expected, rtol=rtol, atol=0)


def test_begun():
    gram = stack((2, 4, 4), torch.float64)
    square = gram.mT.contiguous()
    nu = torch.linalg.matrix_norm(square, keepdim=True).clamp(min=0.7).sqrt()
    z = ROW[1] * gram / nu + ROW[2] * square / nu**2
    q = (ROW[0] * torch.eye(4, dtype=torch.float64, device=DEVICE) + z) / nu.sqrt()
    expected_gram = gram / nu
    torch.testing.assert_close(begun(gram, square, 0.7, ROW), q, rtol=0, atol=1e-12)
    torch.testing.assert_close(gram, expected_gram, rtol=0, atol=1e-12)
    torch.testing.assert_close(square, z, rtol=0, atol=1e-12)


def sensitivity(gram, rows, least, exact):
    """How far rounding the matrix and the coefficients to float16, once and at random, takes the factor, in float64."""
    worst = 0.0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)

        def rounded(x, generator=generator):
            return x * (1 + unit(torch.float16) * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))

        near = [tuple(rounded(torch.tensor(row, dtype=torch.float64)).tolist()) for row in rows]
        worst = max(worst, float((factor_of(rounded(gram.cpu().double()), near, least) - exact.cpu()).abs().max()))
    return worst / float(exact.abs().max())


@pytest.mark.parametrize("side", [1, 7, 16, 30, 64, 128])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("bound", [False, True])
def test_the_kernel_for_small_matrices(kernels, side, steps, bound):
    """Against the same steps in float64. One rounding of what goes in is the yardstick for the three products of a step."""
    from hb_muon.small_kernel import launch_small

    x = stack((3, side, side + 3), torch.float64)
    x *= TRACE**0.5 / torch.linalg.matrix_norm(x, keepdim=True) if bound else 0.9 / torch.linalg.matrix_norm(x, 2, keepdim=True)
    gram, rows = (x @ x.mT).half(), MINIMAX[:steps]
    least = TRACE**2 / side**1.5 if bound else None
    exact = factor_of(gram.double(), rows, least)
    out = torch.full_like(gram, torch.nan)
    launch_small(out, gram, rows, least)
    scale = exact.abs().max()
    ours = (out.double() - exact).abs().max() / scale
    assert ours <= 3 * (sensitivity(gram, rows, least, exact) + unit(torch.float16))
