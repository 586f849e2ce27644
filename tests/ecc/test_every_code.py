"""Every pair that a 16-bit float and a correction can make, and every float32, against integers and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ecc.patterns import all_float32, any_float32, every_bf16_with_residues, every_correction, every_half, patterns, same_bits
from reference import codecs as reference

from hb_ecc import half, ulp

JOINS = {
    "bf16+8": (torch.bfloat16, torch.int8, ulp.join24, ulp.split24),
    "bf16+16": (torch.bfloat16, torch.int16, ulp.join32, ulp.split32),
    "fp16+8": (torch.float16, torch.int8, half.join_8, half.split_8),
    "fp16+16": (torch.float16, torch.int16, half.join_16, half.split_16),
}


def slices(name: str, every: bool) -> list[torch.Tensor]:
    """The corrections, in as many slices as memory asks for; of 2^16 of them, the ends, the middle and a few others."""
    corrections = every_correction(JOINS[name][1])
    if every or len(corrections) == 256:
        return list(corrections.split(16))
    drawn = torch.randint(-(2**15), 2**15, (20,), generator=torch.Generator().manual_seed(2))
    return [torch.cat([torch.tensor([-(2**15), -(2**15) + 1, -256, -1, 0, 1, 255, 2**15 - 1]), drawn]).to(torch.int16)]


def said(name: str, hi: torch.Tensor, lo: torch.Tensor) -> np.ndarray:
    """What a pair stands for by the formula, as float32."""
    low = lo.numpy().astype(np.int64)
    if hi.dtype == torch.float16:
        with np.errstate(invalid="ignore"):
            return reference.half_pair(hi.numpy(), low, 8 * lo.element_size()).astype(np.float32)
    upper = hi.view(torch.int16).numpy().astype(np.int64)
    bits = (reference.pair_24 if name == "bf16+8" else reference.pair_32)(upper, low)
    value = bits.astype(np.uint32).view(np.float32)
    return np.where(np.isnan(value), hi.float().numpy(), value)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize("name", JOINS)
def test_every_pair_reads_as_the_formula_says(name, every):
    """Those that no encoder writes too: a correction is left over when something else writes the float."""
    dtype, _, join, _ = JOINS[name]
    floats = every_half(dtype)
    for corrections in slices(name, every):
        hi = floats[:, None].expand(-1, len(corrections)).contiguous()
        lo = corrections[None, :].expand(len(floats), -1).contiguous()
        ours, theirs = join(hi, lo), torch.from_numpy(said(name, hi, lo))
        number = ~theirs.isnan()
        assert torch.equal(ours.isnan(), ~number)
        assert same_bits(ours[number], theirs[number])
        assert bool((ours[hi.isinf() & (lo >= 0)].abs() == math.inf).all())
        assert bool((ours[(hi == 0) & (lo <= 0)] == 0).all())


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize("name", JOINS)
def test_writing_what_was_read_changes_nothing(name, every):
    """Of every pair: what it stands for is written as a pair that stands for the same."""
    dtype, _, join, split = JOINS[name]
    floats = every_half(dtype)
    for corrections in slices(name, every):
        value = join(floats[:, None].expand(-1, len(corrections)), corrections[None, :].expand(len(floats), -1))
        value = value[~value.isnan()]
        assert same_bits(join(*split(value)), value)


def as_first_written(x: torch.Tensor, dither: torch.Tensor | int) -> None:
    """bf16+8 writes the bits that its first form wrote, which took more operations."""
    hi, lo = ulp.split24(x, dither)
    bits = x.view(torch.int32).numpy().astype(np.int64)
    theirs = reference.first_24(bits, dither if isinstance(dither, int) else dither.numpy().astype(np.int64))
    assert np.array_equal(hi.view(torch.int16).numpy(), theirs[0].astype(np.int16))
    assert np.array_equal(lo.numpy(), theirs[1].astype(np.int8))


@pytest.mark.parametrize("dither", ["nearest", "random", "least", "most"])
@pytest.mark.parametrize("x", [every_bf16_with_residues(), any_float32()], ids=["every-bf16", "random"])
def test_the_short_encoding_is_the_first_one(x, dither):
    drawn = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(4)).to(torch.int32)
    as_first_written(x, {"nearest": 128, "random": drawn, "least": 0, "most": 255}[dither])


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_short_encoding_is_the_first_one_of_every_float32():
    for x in all_float32():
        as_first_written(x, 128)
        hi, lo = ulp.split24(x)
        pair = reference.pair_24(hi.view(torch.int16).numpy().astype(np.int64), lo.numpy().astype(np.int64))
        number = ~x.isnan()
        assert np.array_equal(ulp.join24(hi, lo).view(torch.int32).numpy(), pair.astype(np.uint32).view(np.int32))
        assert same_bits(ulp.join32(*ulp.split32(x))[number], x[number])


HALVES = [
    pytest.param(half.split_8, half.join_8, 2.0**-19, 2.0**-33, 65519.875, id="fp16+8"),
    pytest.param(half.split_16, half.join_16, 0.0, 2.0**-41, 65504 + 16 - 2.0**-8, id="fp16+16"),
]


def within_float16s_bounds(x, split, join, relative, absolute, largest) -> None:
    hi, lo = split(x)
    back, finite = join(hi, lo), x.isfinite()
    assert torch.equal(back.isnan(), x.isnan()) and torch.equal(back.isinf(), x.isinf())
    assert torch.equal(back.signbit()[finite], x.signbit()[finite])
    assert set(back[x.isnan()].view(torch.int32).tolist()) <= {ulp.QUIET_NAN}
    wide, error = x.double().abs(), (back.double() - x.double()).abs()
    normal, small, beyond = (wide >= 2.0**-14) & (wide <= largest), wide < 2.0**-14, finite & (wide > largest)
    assert bool((error <= relative * wide)[normal].all())
    assert bool((error <= absolute)[small].all())
    assert bool((back[beyond].abs() == largest).all())
    exact = x.half().double()[normal & (wide <= 65504)]  # the float alone: to nearest, but for the two roundings in turn
    short = hi.double()[normal & (wide <= 65504)]
    x = x.double()[normal & (wide <= 65504)]
    assert bool(((short - x).abs() <= (exact - x).abs() + x.abs() * 2.0**-18).all())


@pytest.mark.parametrize(("split", "join", "relative", "absolute", "largest"), HALVES)
def test_float16_and_a_correction_are_within_their_bounds(split, join, relative, absolute, largest):
    generator = torch.Generator().manual_seed(6)
    inside = torch.ldexp(
        torch.rand(1_000_000, generator=generator) + 1, torch.randint(-48, 17, (1_000_000,), generator=generator)
    )
    for x in (
        inside,
        -inside,
        any_float32(),
        every_half(torch.float16).float(),
        patterns(torch.arange(0x477FE000, 0x47801000)),
    ):
        within_float16s_bounds(x, split, join, relative, absolute, largest)
    error = (join(*split(inside)).double() - inside.double()).abs()
    assert float(error[inside < 2.0**-14].max()) > 0.99 * absolute  # the bounds are no looser than they must be
    assert float((error / inside)[(inside >= 2.0**-14) & (inside < 65504)].max()) >= 0.99 * relative


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("split", "join", "relative", "absolute", "largest"), HALVES)
def test_every_float32_is_within_float16s_bounds(split, join, relative, absolute, largest):
    for x in all_float32():
        hi, lo = split(x)
        back, finite = join(hi, lo), x.isfinite()
        wide, error = x.double().abs(), (back.double() - x.double()).abs()
        bound = torch.where(wide < 2.0**-14, absolute, relative * wide)
        assert bool((error <= bound)[finite & (wide <= largest)].all())
        assert bool((back[finite & (wide > largest)].abs() == largest).all())
        assert torch.equal(back.isnan(), x.isnan()) and torch.equal(back.isinf(), x.isinf())


@pytest.mark.full  # half a minute of compiling
@pytest.mark.parametrize("name", JOINS)
def test_inductor_writes_and_reads_the_same_bits(name):
    _, _, join, split = JOINS[name]
    x = torch.cat([every_bf16_with_residues(), any_float32(), any_float32(seed=2).half().float()])
    hi, lo, back = torch.compile(lambda x: (*split(x), join(*split(x))), dynamic=False)(x)
    theirs = split(x)
    assert same_bits(hi, theirs[0]) and same_bits(lo, theirs[1]) and same_bits(back, join(*theirs))


@pytest.mark.parametrize(
    ("x", "wanted"),
    [
        (0.0, 0.0), (-0.0, -0.0), (math.inf, math.inf), (-math.inf, -math.inf), (1e5, 65519.875), (-3e38, -65519.875),
        (65504.0, 65504.0), (65519.9, 65519.875), (2.0**-33, 2.0**-32), (-(2.0**-33), -(2.0**-32)), (2.0**-34, 0.0),
        (-1e-45, -0.0), (1 + 2.0**-19, 1 + 2.0**-18), (-1 - 2.0**-19, -1 - 2.0**-18), (1 + 2.0**-20, 1.0),
        (2.0**-14 - 2.0**-33, 2.0**-14),
    ],
)  # fmt: skip
def test_float16_and_8_bits_at_the_ends_and_at_ties(x, wanted):
    """Halves go away from zero; 1e5 does not become inf."""
    assert same_bits(half.join_8(*half.split_8(torch.tensor([x]))), torch.tensor([wanted]))


def test_a_dither_rounds_to_float16_and_8_bits_stochastically():
    """Over every dither, the mean is the value; nothing finite becomes inf; what the pair holds is never changed."""
    every = torch.arange(32, dtype=torch.int32)
    for value in (1.0 + 2.0**-20, -3.14159, 2.0**-20 * 1.2345678, 3 * 2.0**-34, 0.0, 1000.123):
        back = half.join_8(*half.split_8(torch.full((32,), value), every)).double()
        held = float(torch.tensor(value).double())
        assert abs(float(back.mean()) - held) <= 2.0**-37 and len(back.unique()) <= 2
    ends = torch.tensor([65519.875, 7e4, -3e38, math.inf]).repeat_interleave(32)
    back = half.join_8(*half.split_8(ends, every.repeat(4)))
    assert torch.equal(back.isinf(), ends.isinf()) and float(back[:96].abs().min()) == 65519.875


def test_the_relative_error_of_bf16_plus_8():
    x = any_float32()
    x = x[x.isfinite() & (x.abs() >= 2.0**-126)]
    error = ((ulp.join24(*ulp.split24(x)).double() - x.double()) / x.double()).abs()
    assert float(error.max()) <= 1.6e-5
