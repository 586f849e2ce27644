"""The codecs inside optimizers: what is stored, on every backend, and what it costs in accuracy."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings

import pytest
import torch
from core.kit import combined, distance, parameters, run, same, values

from hb_adam import SGD, AdamW
from hb_ecc.codec import BF16Plus8, BF16Plus16, FP16Plus8, FP16Plus16
from hbcore.engine.graph.program import direct_reduce
from hbcore.engine.planning.segment_batch import at_least_1d
from hbcore.errors import StateWarning
from hbcore.registry import Registry
from hbcore.state.codec import Cast, StateCodec

CODECS = {"bf16+8": BF16Plus8, "bf16+16": BF16Plus16, "fp16+8": FP16Plus8, "fp16+16": FP16Plus16}
WIDTH = {"bf16+8": torch.int8, "bf16+16": torch.int16, "fp16+8": torch.int8, "fp16+16": torch.int16}
SHAPES = ((50, 41), (13,), (2, 3, 4), (1,), ())
ALL = pytest.mark.parametrize("name", CODECS)


def with_codec(optimizer, codec):
    """The optimizer, storing its slots with ``codec``."""
    optimizer.core.chain.settings = dataclasses.replace(optimizer.settings, codec=codec)
    return optimizer


def steps(count, dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(s, generator=generator).to(dtype) for s in shapes] for _ in range(count)]


def stored(optimizer, params):
    """Every state tensor but the step counter."""
    return [v for p in params for k, v in sorted(optimizer.state[p].items()) if k != "step"]


def decoded(optimizer, params, slot):
    codec = optimizer.settings.codec
    return [codec.read(optimizer.state[p], slot, torch.float32) for p in params]


@ALL
def test_the_registry_finds_it_and_it_is_a_codec(name, monkeypatch):
    monkeypatch.setenv("HBCORE_PLUGINS", "hb_ecc")  # other tests make up plugins of the other names
    codec = Registry().load_codec(name)()
    assert isinstance(codec, StateCodec) and codec == CODECS[name]() and codec.name == name
    assert pickle.loads(pickle.dumps(codec)) == codec == copy.deepcopy(codec)
    assert BF16Plus8() != BF16Plus16()


@ALL
def test_what_is_stored(name):
    params = parameters(SHAPES)
    optimizer = with_codec(AdamW(params), CODECS[name]())
    run(optimizer, params, steps(2))
    for p in params:
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg#ecc", "exp_avg_sq", "exp_avg_sq#ecc"}
        for slot in ("exp_avg", "exp_avg_sq"):
            assert state[slot].dtype == CODECS[name].short and state[f"{slot}#ecc"].dtype == WIDTH[name]
            assert state[slot].shape == state[f"{slot}#ecc"].shape == p.shape


@ALL
def test_float64_parameters_keep_plain_float64_state(name):
    plain, coded = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    run(AdamW(plain), plain, steps(3, torch.float64))
    optimizer = with_codec(AdamW(coded), CODECS[name]())
    run(optimizer, coded, steps(3, torch.float64))
    assert same(values(plain), values(coded))
    assert {k: v.dtype for k, v in optimizer.state[coded[0]].items() if k != "step"} == {
        "exp_avg": torch.float64,
        "exp_avg_sq": torch.float64,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bf16_plus_16_is_float32_state_bit_for_bit(dtype):
    plain, coded = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    reference = AdamW(plain)
    optimizer = with_codec(AdamW(coded), BF16Plus16())
    run(reference, plain, steps(20, dtype))
    run(optimizer, coded, steps(20, dtype))
    assert same(values(plain), values(coded))
    for slot in ("exp_avg", "exp_avg_sq"):
        assert same(decoded(optimizer, coded, slot), [reference.state[p][slot] for p in plain])


@pytest.mark.parametrize(
    ("dtype", "backend", "name"),
    combined(
        [torch.float32, torch.bfloat16],
        ["triton", "inductor"],
        CODECS,
        compiled=[
            (torch.float32, "inductor", "bf16+8"),
            (torch.bfloat16, "inductor", "bf16+16"),
            (torch.float32, "inductor", "fp16+8"),
        ],
    ),
    ids=str,
)
def test_backends_store_the_same_bits(dtype, backend, name):
    """A momentum of 0.5 and a weight of a power of two round nothing, so that the codec alone is compared."""
    kept = []
    for choice in ("eager", backend):
        params = parameters(SHAPES, dtype)
        optimizer = with_codec(SGD(params, lr=0.25, momentum=0.5, compile=choice), CODECS[name]())
        run(optimizer, params, steps(4, dtype))
        assert optimizer.report.backend == choice
        kept.append([*stored(optimizer, params), *values(params)])
    assert same(*kept)


def test_float16_and_16_bits_are_float32_state_of_gradients_in_its_range():
    """Gradients of powers of two and decays of powers of two, so that no moment falls below 2^-41 in part."""
    grads = [[torch.full((8,), 2.0**k) for k in (0, -3, 5)] for _ in range(4)]
    kept = []
    for codec in (Cast(), FP16Plus16()):
        params = parameters(((8,), (8,), (8,)))
        optimizer = with_codec(AdamW(params, betas=(0.5, 0.75)), codec)
        run(optimizer, params, grads)
        kept.append([*values(params), *decoded(optimizer, params, "exp_avg_sq")])
    assert same(*kept)


@pytest.mark.parametrize("name", ["fp16+8", "fp16+16"])
def test_float16_warns_of_what_it_cannot_store(name):
    with pytest.warns(
        StateWarning, match=rf"ecc='{re.escape(name)}': magnitudes below 2\^-\d+ are stored as zero, .* pass 'bf16"
    ) as caught:
        AdamW(parameters(), ecc=name)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(parameters(), ecc="bf16+8")


@pytest.mark.parametrize("name", CODECS)
def test_parameters_of_the_short_float_move_by_less_than_its_last_bit(name):
    """The correction has the bits that the parameter lacks: 40 steps of 1e-4 from 1.0, which the float alone rounds away."""
    p = torch.nn.Parameter(torch.ones(8, dtype=CODECS[name].short))
    optimizer = SGD([p], lr=1e-4, momentum=0.0, param_ecc=name)
    run(optimizer, [p], [[torch.ones_like(p)] for _ in range(40)])
    stored = {"param": p.detach(), **{k: v for k, v in optimizer.state[p].items() if k.startswith("param#")}}
    value = CODECS[name]().read(stored, "param", torch.float32)
    assert p.dtype == CODECS[name].short and float((value - 0.996).abs().max()) < 40 * 2.0**-17
    assert float((p.detach().float() - value).abs().max()) <= 2.0**-9


@ALL
def test_traced_is_untraced(name):
    """Calling the segment spec directly, without tracing, gives the same result."""
    traced = parameters(SHAPES)
    optimizer = with_codec(AdamW(traced, compile="eager"), CODECS[name]())
    run(optimizer, traced, steps(1))
    spec = optimizer.core.chain.spec(optimizer.param_groups[0])
    numbers = {"lr": 0.0025, "betas.0": 0.9, "betas.1": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    numbers |= {"warmup_steps": 0.0, "step": 1.0, "model_numel": 0.0}
    scalars = {n: torch.tensor(numbers.get(n, 0.0), dtype=torch.float64) for n in spec.scalar_names}
    for p, start, g in zip(traced, parameters(SHAPES), steps(1)[0], strict=True):
        blank = {k: torch.zeros_like(v) for k, v in optimizer.state[p].items() if k != "step"}
        # as the engine gives them: beside a 0-d tensor, a scalar would change its dtype
        tensors = {k: at_least_1d(v) for k, v in {"param": start.detach(), "grad": g, **blank}.items()}
        results = spec.update(tensors, scalars, torch.tensor(float(g.numel())).double(), direct_reduce)
        assert same([results[k] for k in blank], [at_least_1d(optimizer.state[p][k]) for k in blank])


@pytest.mark.parametrize("backend", ["eager", "triton"])
@ALL
def test_every_bit_pattern_is_written_alike(name, backend):
    """Gradients of any bits at all, denormals, inf and NaN among them, through momentum 0: the slot is the gradient."""
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    ends = torch.tensor([0, -(2**31), 1, 0x7F7FFFFF, 0x7F7FFF80, 0x7F800000, 0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32)
    g = torch.cat([bits, ends]).view(torch.float32)
    p = torch.nn.Parameter(torch.zeros_like(g))
    optimizer = with_codec(SGD([p], momentum=0.0, compile=backend), CODECS[name]())
    run(optimizer, [p], [[g]])
    assert optimizer.report.backend == backend
    codec = CODECS[name]()
    blank = {part: torch.zeros(0, dtype=dtype) for part, dtype in codec.parts("x", torch.float32).items()}
    wanted = codec.write(blank, "x", g + 0.0)  # momentum 0 times a zero slot turns -0 into 0
    for part, value in wanted.items():
        ours = optimizer.state[p][part.replace("x", "momentum_buffer")]
        assert torch.equal(ours.view(value.dtype).view(WIDTH[name] if "#" in part else torch.int16),
                           value.view(WIDTH[name] if "#" in part else torch.int16))  # fmt: skip


def test_two_hundred_steps_of_adamw():
    """Relative to float32 state: 8 bits of correction make up for most of what bfloat16 state loses, and 16 for all."""
    shapes = ((64, 64), (64,))
    moved = {}
    for name, codec in (("float32", Cast()), ("bfloat16", Cast(torch.bfloat16)), ("8", BF16Plus8()), ("16", BF16Plus16())):
        params = parameters(shapes)
        start = values(params)
        run(with_codec(AdamW(params), codec), params, steps(200, shapes=shapes))
        moved[name] = [p - s for p, s in zip(values(params), start, strict=True)]
    error = {name: distance(m, moved["float32"]) for name, m in moved.items()}
    assert error["16"] == 0
    assert error["8"] < 2e-4 < 2e-3 < error["bfloat16"]
