"""The integer encodings: exact where they promise it, within their bound elsewhere, and defined on every bit pattern."""

from __future__ import annotations

import pytest
import torch
from ecc.patterns import INF, MAX, any_float32, every_bf16_with_residues, patterns, same_bits

from hb_ecc.ulp import join24, join32, split24, split32

SMALLEST_NORMAL = 2.0**-126

SAMPLES = pytest.mark.parametrize("x", [every_bf16_with_residues(), any_float32()], ids=["every-bf16", "random"])


@SAMPLES
def test_32_bits_come_back_bit_for_bit(x):
    hi, lo = split32(x)
    assert (hi.dtype, lo.dtype) == (torch.bfloat16, torch.int16)
    back, nan = join32(hi, lo), x.isnan()
    assert same_bits(back[~nan], x[~nan])
    assert set(back[nan].view(torch.int32).tolist()) == {0x7FC00000} and bool(hi[nan].isnan().all())


@SAMPLES
def test_24_bits_come_back_within_their_bound(x):
    hi, lo = split24(x)
    assert (hi.dtype, lo.dtype) == (torch.bfloat16, torch.int8)
    back, finite = join24(hi, lo), x.isfinite()
    assert torch.equal(back.isnan(), x.isnan()) and torch.equal(back.isinf(), x.isinf())
    assert torch.equal(back.signbit()[finite], x.signbit()[finite])
    x, back = x[finite].double(), back[finite].double()
    error, normal = (back - x).abs(), x.abs() >= SMALLEST_NORMAL
    assert float((error / x.abs())[normal].max()) <= 2.0**-16
    assert float(error[~normal].max()) <= 2.0**-142
    assert float((error / x.abs())[normal].max()) > 0.99 * 2.0**-16  # the bound is no looser than it must be


@SAMPLES
def test_what_24_bits_hold_comes_back_bit_for_bit(x):
    x = patterns(x.view(torch.int32) & ~0xFF)
    x = x[~x.isnan()]
    assert same_bits(join24(*split24(x)), x)
    once = join24(*split24(x * 1.2345))
    once = once[~once.isnan()]
    assert same_bits(join24(*split24(once)), once)  # writing what was read changes nothing


@SAMPLES
@pytest.mark.parametrize("split", [split24, split32])
def test_the_bfloat16_alone_is_the_value_rounded(split, x):
    hi = split(x)[0].double()
    inside = x.isfinite() & (x.abs() < 3.38e38)
    x, hi = x[inside].double(), hi[inside]
    step = torch.maximum(x.abs(), torch.tensor(SMALLEST_NORMAL, dtype=torch.float64)) * 2.0**-7
    assert bool(((hi - x).abs() <= step * (0.5 + 2.0**-9)).all())


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (0.0, 0.0), (-0.0, -0.0), (INF, INF), (-INF, -INF), (1e-45, 0.0), (-1e-45, -0.0), (2.0**-142, 2.0**-141),
        (MAX, patterns(0x7F7FFF00).item()), (-MAX, -patterns(0x7F7FFF00).item()),
        (patterns(0x7F7FFF80).item(), patterns(0x7F7FFF00).item()), (1 + 2.0**-17, 1.0), (1 + 2.0**-16, 1 + 2.0**-15),
        (-1 - 2.0**-16, -1 - 2.0**-15),
    ],
)  # fmt: skip
def test_24_bits_at_the_ends_and_at_ties(x, wanted):
    """Halves go away from zero; near the largest float32 they would go to inf, and are cut off instead."""
    assert same_bits(join24(*split24(torch.tensor([x]))), torch.tensor([wanted]))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7F8000FF])
def test_nan_stays_nan_whatever_its_payload(bits):
    x = patterns([bits])
    for back in (join32(*split32(x)), join24(*split24(x))):
        assert int(back.view(torch.int32)) == 0x7FC00000


def test_a_correction_of_zero_stands_for_the_bfloat16():
    hi = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    number = ~hi.isnan()
    for join, dtype in ((join24, torch.int8), (join32, torch.int16)):
        assert same_bits(join(hi, torch.zeros_like(hi, dtype=dtype))[number], hi.float()[number])


def test_a_dither_rounds_stochastically():
    """Over every dither, the mean is the value; what 24 bits hold is never changed; nothing finite becomes inf."""
    every = torch.arange(256, dtype=torch.int32)
    for value in (1.0 + 2.0**-20, -3.14159, 1e-40, 0.0, 65504.0):
        x = torch.full((256,), value)
        back = join24(*split24(x, every)).double()
        assert float(back.mean()) == float(x[0].double()) and len(back.unique()) <= 2
    ends = torch.tensor([MAX, -MAX, INF, -INF]).repeat_interleave(256)
    back = join24(*split24(ends, every.repeat(4)))
    assert torch.equal(back.isinf(), ends.isinf())
