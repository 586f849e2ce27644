"""The random bits are Triton's, bit for bit, and rounding with them is unbiased and keeps what need not be rounded."""

from __future__ import annotations

import pytest
import torch

from hbcore.rules.noise import philox4x32, stochastic_round_bf16

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

COUNTERS = [0, 1, 2, 5, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**40 + 3, 2**63 - 1, -1]
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32 + 5, 2**52 + 123, 2**63 - 1, -1, -(2**62)]


@triton.jit
def draw(offsets, out, seed, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, tl.load(offsets + at, mask=at < n, other=0))
    tl.store(out + at, a.to(tl.int64), mask=at < n)
    tl.store(out + n + at, b.to(tl.int64), mask=at < n)
    tl.store(out + 2 * n + at, c.to(tl.int64), mask=at < n)
    tl.store(out + 3 * n + at, d.to(tl.int64), mask=at < n)


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_is_tritons_bit_for_bit(seed):
    from hbcore.engine.backends.triton.device_lib import INTERPRETED

    device = "cpu" if INTERPRETED else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter or a GPU")
    random = torch.randint(-(2**63), 2**63 - 1, (500,), generator=torch.Generator().manual_seed(0))
    counter = torch.cat([torch.tensor(COUNTERS), random]).to(device)
    theirs = torch.zeros(4, len(counter), dtype=torch.int64, device=device)
    draw[(1,)](counter, theirs, seed, len(counter), 512)
    assert torch.equal(torch.stack(philox4x32(seed, counter)), theirs)
    assert torch.equal(torch.stack(philox4x32(torch.tensor(seed, device=device), counter)), theirs)


def test_philox_gives_the_known_answer():
    """From the test vectors of Random123, the authors' library: ten rounds, counter and key zero."""
    words = [int(w) for w in philox4x32(0, torch.zeros((), dtype=torch.int64))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_takes_int32_counters_of_any_shape():
    counter = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    for small, large in zip(philox4x32(7, counter), philox4x32(7, counter.long()), strict=True):
        assert small.shape == (2, 3) and torch.equal(small, large)


def test_the_bits_are_uniform():
    words = torch.stack(philox4x32(3, torch.arange(50_000)))
    for bit in range(32):
        assert abs(float(((words >> bit) & 1).double().mean()) - 0.5) < 6 * 0.5 / 200_000**0.5


def test_stochastic_rounding_is_exact_in_the_mean():
    """Over every value of the random bits, not over a sample of them."""
    every = torch.arange(2**16)
    for x in (1.0, -1.0, 3.14159, -0.007, 1e-39, -2.5e30, 1.17549435e-38):
        value = torch.full((2**16,), x)
        rounded = stochastic_round_bf16(value, every).double()
        assert len(rounded.unique()) <= 2
        assert float(rounded.mean()) == float(value[0].double())


def test_stochastic_rounding_goes_to_a_neighbour_and_keeps_a_bfloat16():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    most = torch.full_like(patterns, 0, dtype=torch.int32) + 0xFFFF
    kept = stochastic_round_bf16(patterns.float(), most)
    nan = patterns.isnan()
    assert torch.equal(kept[~nan].view(torch.int16), patterns[~nan].view(torch.int16)) and bool(kept[nan].isnan().all())


@pytest.mark.parametrize("bits", [0, 1, 0x7FFF, 0xFFFF])
def test_stochastic_rounding_of_the_ends_of_the_range(bits):
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor(
        [torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, float("inf"), float("-inf"), float("nan")]
    )
    x = torch.cat([x, torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)])
    rounded = stochastic_round_bf16(x, torch.full(x.shape, bits))
    assert rounded[:4].tolist() == [largest, -largest, float("inf"), float("-inf")]
    assert bool(rounded[4:].isnan().all())
