"""State in one byte an element, against float64: the bounds, what is never zero, the ends, and what training makes of it."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from ecc.patterns import any_float32, patterns, same_bits
from reference import codecs as reference

import hbcore.state.blocks
from hb_ecc.blockwise import Int8, UInt8
from hbcore.api import BlockCodec, OptionError, Slot, block_shape, root_code, spread, zeros

CODECS = {"int8": Int8(), "uint8": UInt8()}
BOTH = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
INF, NAN = math.inf, math.nan


def blank(codec, dtype=torch.float32):
    return {part: torch.zeros(0, dtype=dtype) for part, dtype in codec.parts("s", dtype).items()}


def written(codec, x):
    return codec.write(blank(codec), "s", x)


def round_trip(codec, x):
    return codec.read(written(codec, x), "s", torch.float32)


def samples(codec, sigma=2.0, shape=(2000, 96)):
    """Lognormal magnitudes; every seventh is zero, and every fifth row a million times smaller."""
    generator = torch.Generator().manual_seed(3)
    x = torch.exp(sigma * torch.randn(shape, generator=generator)) * torch.randn(shape, generator=generator).sign()
    x.view(-1)[::7] = 0
    x[::5] *= 1e-6
    return x.abs() if codec.name == "uint8" else x


@BOTH
def test_it_is_a_codec_of_blocks(codec):
    assert isinstance(codec, BlockCodec) and not codec.rounds
    assert pickle.loads(pickle.dumps(codec)) == codec == copy.deepcopy(codec) and Int8() != UInt8()
    assert codec.parts("s", torch.float32) == {"s": codec.codes, "s#scale": codec.scales}
    assert codec.per_block("s") == {"s#scale"} and codec.parts("s", torch.float64) == {"s": torch.float64}


@BOTH
@pytest.mark.parametrize("shape", [(64,), (3, 64), (5, 8, 4, 3, 4), (2, 5, 32)])
def test_shapes_and_what_is_flat_is_the_same(codec, shape):
    x = samples(codec, shape=shape)
    whole, flat = written(codec, x), written(codec, x.flatten())
    assert whole["s"].shape == x.shape and whole["s"].dtype == codec.codes and whole["s#scale"].dtype == codec.scales
    assert len(shape) == 1 or whole["s#scale"].shape == block_shape(x.shape)
    assert all(torch.equal(whole[k].flatten(), flat[k]) for k in whole)
    assert torch.equal(codec.read(whole, "s", torch.float32).flatten(), codec.read(flat, "s", torch.float32))


@BOTH
@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_the_root_is_off_by_half_a_step_at_most(codec, sigma):
    x, top = samples(codec, sigma), codec.largest
    stored = written(codec, x)
    codes, scales = reference.blocks(x.view(-1, 32).numpy(), top, 24 if codec.scales == torch.float32 else 8)
    assert np.array_equal(stored["s#scale"].float().view(-1).numpy(), scales.astype(np.float32))
    ours = stored["s"].view(-1, 32).numpy().astype(np.float64)
    assert float((np.abs(ours - codes) > 0).mean()) < 1e-4 and float(np.abs(ours - codes).max()) <= 1  # ties
    back = codec.read(stored, "s", torch.float32).double()
    expected = torch.from_numpy(reference.values(ours, scales)).view(x.shape)
    assert float(((back - expected).abs() / expected.abs().clamp(min=1e-30)).max()) <= 2.0**-22
    wide = torch.from_numpy(scales).repeat_interleave(32).view(x.shape)
    step = ((back.abs().sqrt() - x.double().abs().sqrt()).abs() / wide.sqrt())[x != 0]
    half = (x.double().abs() >= 2 * wide)[x != 0]
    assert float(step[half].max()) <= 0.5859 and float(step.max()) <= 1 + 1e-6  # codes 1 and 2 meet at the root of 2
    assert float(step[half].max()) > 0.49 or sigma < 1  # the bound is no looser than it must be


@BOTH
def test_what_is_not_zero_is_never_zero_and_zero_is(codec):
    x = samples(codec, 8.0)
    back = round_trip(codec, x)
    assert torch.equal(back == 0, x == 0) and torch.equal(back.sign(), x.sign())
    assert int((written(codec, x)["s"].abs() == 1).sum()) > 1000  # most would round to 0


@BOTH
def test_writing_what_was_read_changes_nothing(codec):
    for sigma in (0.1, 1.0, 4.0):
        once = written(codec, samples(codec, sigma))
        twice = written(codec, codec.read(once, "s", torch.float32))
        assert all(torch.equal(once[k], twice[k]) for k in once)


@BOTH
def test_a_blocks_largest_comes_back_but_for_the_scales_rounding(codec):
    for x in (samples(codec), samples(codec, 0.01)):
        back = round_trip(codec, x).view(-1, 32)
        at = x.view(-1, 32).abs().argmax(1, keepdim=True)
        off = back.gather(1, at) / x.view(-1, 32).gather(1, at)
        assert bool((off >= 1 - 2.0**-22).all()) and bool(
            (off <= (1 + 2.0**-22 if codec.name == "uint8" else 1 + 2.0**-7)).all()
        )


def block(*values, fill=0.0):
    return torch.tensor([*values, *[fill] * (32 - len(values))])


@BOTH
@pytest.mark.parametrize(
    ("x", "smallest"),
    [
        (block(), False), (block(-0.0), False), (block(1e-45), True), (block(1e-38, 1e-45), True),
        (block(2.0**-90, 1e-45), False), (block(3.4e38, 1.0), False), (block(fill=3.4e38), False),
    ],
)  # fmt: skip
def test_the_ends_are_finite_and_nonnegative(codec, x, smallest):
    stored = written(codec, x)
    back = codec.read(stored, "s", torch.float32)
    scale = float(stored["s#scale"])
    assert scale == 2.0**-114 if smallest else scale == pytest.approx(float(x.max()) / codec.largest**2, rel=2.0**-7)
    assert bool(back.isfinite().all()) and bool((back >= 0).all()) and torch.equal(back == 0, x == 0)
    assert float((back - x).abs().max()) <= scale + 0.02 * float(x.abs().max())


@BOTH
@pytest.mark.parametrize("bad", [(INF,), (NAN,), (INF, NAN), (1e38, INF)])
def test_a_block_with_inf_or_nan_is_not_finite_and_the_next_one_is(codec, bad):
    x = torch.cat([block(*bad, fill=0.5), block(fill=0.5), block(*bad, 1e-45)])
    stored = written(codec, x)
    back = codec.read(stored, "s", torch.float32)
    assert not back[:32].isfinite().any() and not back[64:].isfinite().any()
    assert bool(((back[32:64] / 0.5 - 1).abs() <= 2.0**-7).all())
    assert torch.equal(stored["s#scale"].isnan(), torch.tensor([any(map(math.isnan, bad)), False, any(map(math.isnan, bad))]))
    assert set(stored["s"][x.isnan()].tolist()) <= {codec.largest}  # a code that backends agree on
    if NAN not in bad:
        assert torch.equal(back[:32] == INF, x[:32] == INF)


@BOTH
def test_any_bits_at_all_are_written_alike_and_read_defined(codec):
    """Blocks of a random exponent each, with random bits around; and of wholly random bits, NaN among them."""
    x = any_float32(320_000, seed=9)
    x = x.abs() if codec.name == "uint8" else x
    stored = written(codec, x)
    back, scale = codec.read(stored, "s", torch.float32), spread(stored["s#scale"].float(), x)
    assert torch.equal(back.isfinite(), scale.isfinite())
    finite = scale.isfinite()
    lost = x.abs().double() < scale.double() * 2.0**-149
    assert torch.equal((back == 0)[finite & ~lost], (x == 0)[finite & ~lost])
    assert bool((back.abs() <= scale * codec.largest**2 * (1 + 2.0**-22))[finite].all())
    assert torch.equal((back < 0)[finite & ~lost], (x < 0)[finite & ~lost])


@BOTH
def test_float64_parameters_keep_plain_float64_state(codec):
    x = samples(codec).double()
    stored = codec.write(blank(codec, torch.float64), "s", x)
    assert set(stored) == {"s"} and torch.equal(codec.read(stored, "s", torch.float64), x)
    assert torch.equal(round_trip(codec, x.float()).double(), codec.read(written(codec, x.float()), "s", torch.float64))


def test_a_slots_sign_decides():
    p = torch.zeros(4, 32)
    assert Int8().of(zeros(p, "rotate")) == Int8() and Int8().of(zeros(p)) == Int8()
    assert Int8().of(zeros(p, "permute")) == UInt8() == UInt8().of(Slot(p.shape, nonnegative=True))
    with pytest.raises(OptionError, match=r"may be negative, and the codec stores no signs; pass ecc='int8'"):
        UInt8().of(zeros(p, "rotate"))


def around(whole):
    """The float32 numbers around the squares at which the code changes."""
    n = torch.tensor(whole, dtype=torch.float32)
    bits = (n * (n + 1)).view(torch.int32)
    return patterns((bits[:, None].long() + torch.arange(-50, 51)).ravel())


@pytest.mark.parametrize("off", [0, 1, -1, 5, -5])
def test_the_root_is_the_same_whatever_the_last_bits_of_a_square_root_are(off, monkeypatch):
    w = torch.cat([around(list(range(1, 256))), torch.linspace(0, 65025, 100_001), torch.arange(256.0).square()])
    true = torch.sqrt
    monkeypatch.setattr(hbcore.state.blocks.torch, "sqrt", lambda x: patterns((true(x).view(torch.int32) + off).clamp(min=0)))
    found = root_code(w, 255).numpy()
    n = found.astype(np.float64)
    x = np.minimum(w.numpy().astype(np.float64), 65025)
    assert bool(((n * (n - 1) < x) | (n == 0)).all()) and bool((x <= n * (n + 1)).all()) and np.array_equal(n == 0, x == 0)


@BOTH
def test_neither_side_depends_on_a_fused_multiply_add(codec):
    """No product of the graphs is added to anything, so that a compiler has nothing to fuse."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x = samples(codec, shape=(2, 64))
    stored = written(codec, x)
    aten = torch.ops.aten
    for graph in (
        make_fx(lambda t: codec.write(blank(codec), "s", t))(x).graph,
        make_fx(lambda a, b: codec.read({"s": a, "s#scale": b}, "s", torch.float32))(*stored.values()).graph,
    ):
        products = [n for n in graph.nodes if n.target in (aten.mul.Tensor, aten.mul.Scalar)]
        sums = {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.add.Scalar, aten.sub.Scalar}
        assert products and not any(user.target in sums for n in products for user in n.users)


@pytest.mark.full  # half a minute of compiling
def test_inductor_writes_and_reads_the_same_bits():
    x = torch.cat([any_float32(32_000, seed=4), samples(Int8()).flatten(), torch.zeros(32)])

    def both(x):
        kept = {name: written(codec, x) for name, codec in CODECS.items()}
        return kept, {name: CODECS[name].read(stored, "s", torch.float32) for name, stored in kept.items()}

    theirs = both(x)
    ours = torch.compile(both, dynamic=False)(x)
    for name in CODECS:
        number = ~theirs[1][name].isnan()
        assert torch.equal(ours[0][name]["s"], theirs[0][name]["s"])
        assert same_bits(ours[0][name]["s#scale"].nan_to_num(), theirs[0][name]["s#scale"].nan_to_num())
        assert same_bits(ours[1][name][number], theirs[1][name][number])


def adamw(sigma, coded, steps=300, b1=0.9, b2=0.99):
    """AdamW without decay and lr 1 on gradients lognormal(sigma) in size: the weights, and the largest step."""
    generator = torch.Generator().manual_seed(7)
    size = 1e-3 * torch.exp(sigma * torch.randn(4096, generator=generator))
    m, v, p, largest = torch.zeros(4096), torch.zeros(4096), torch.zeros(4096), 0.0
    for t in range(1, steps + 1):
        g = size * (torch.randn(4096, generator=generator) + 0.3)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + 1e-8)
        p, largest = p - step, max(largest, float(step.abs().max()))
        if coded:
            m, v = round_trip(CODECS["int8"], m), round_trip(CODECS["uint8"], v)
    return p.double(), largest


@pytest.mark.parametrize(("sigma", "error"), [(0.0, 8e-3), (0.5, 2e-2), (1.0, 0.1), (2.0, 0.5)])
def test_300_steps_of_adamw_are_near_float32s_and_none_is_long(sigma, error):
    """The bound of a step is what a smallest code of 1 is for: if it were 0, steps are thousands of times too long."""
    ours, largest = adamw(sigma, coded=True)
    theirs, _ = adamw(sigma, coded=False)
    assert float((ours - theirs).norm() / theirs.norm()) < error
    assert largest <= 3.0


@pytest.mark.parametrize(("sigma", "above"), [(0.0, 2.1), (1.0, 1.1)])
def test_a_second_moment_follows_gradients_that_become_smaller(sigma, above):
    """Ten times, with beta2 0.999. A scale of eight bits would stay where it is, and the root 7.7 times too large."""
    generator = torch.Generator().manual_seed(1)
    size = torch.exp(sigma * torch.randn(1600, generator=generator))
    exact, v = size.double().square(), round_trip(CODECS["uint8"], size.square())
    for _ in range(5000):
        g = 0.1 * size * torch.randn(1600, generator=generator)
        exact = 0.999 * exact + 0.001 * g.double().square()
        v = round_trip(CODECS["uint8"], 0.999 * v + 0.001 * g * g)
    share = (v.double() / exact).sqrt()
    assert 0.9 <= float(share.median()) <= above
