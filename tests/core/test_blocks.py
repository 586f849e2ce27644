"""State by blocks of 32 elements: which slots have it, the same bits on every backend, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from core.kit import gradients, optimizer_of, parameters, resumes, run, same
from torch import nn

import hbcore
from hbcore import CheckpointError, OptionError, StateWarning
from hbcore.api import BLOCK, Transform, block_amax, block_shape, root_code, spread

SHAPES = ((64, 96), (5, 32, 3, 3), (50,), (3, 64), (8, 3, 3, 3), (7, 33), (1, 32))
BLOCKS = {(64, 96): (64, 3), (5, 32, 3, 3): (5, 9), (3, 64): (3, 2), (1, 32): (1, 1)}
"""The shapes that are made of blocks, and those of their scales."""

MIXED = {"exp_avg": "int8", "exp_avg_sq": "bf16+8"}
CASES = {
    "AdamW": ("AdamW", {"ecc": "int8"}),
    "AdamW-mixed": ("AdamW", {"ecc": MIXED}),
    "AdamW-stochastic": ("AdamW", {"ecc": MIXED, "param_ecc": "bf16+8", "stochastic_rounding": True}),
    "AdamW-clipped": ("AdamW", {"ecc": "int8", "caution": True, "gradient_clipping": "global_l2norm_clip", "mars": True}),
    "AdamW-skipping": ("AdamW", {"ecc": "int8", "skip_nonfinite": True}),
    "LaProp": ("LaProp", {"ecc": "int8", "palm": True}),
    "LaProp-all": ("LaProp", {"ecc": "bf16+8", "mars": True, "caution": True, "palm": True}),
    "Lion": ("Lion", {"ecc": "int8"}),
    "Muon": ("Muon", {"ecc": "int8", "param_ecc": "bf16+8"}),
    "SOAP": ("SOAP", {"ecc": "int8", "precondition_frequency": 2}),
    "SOAP-regions": ("SOAP", {"ecc": "int8", "split": True, "max_precond_dim": 16}),  # whose rows are half a block
    "PSGDKron": ("PSGDKron", {"ecc": "int8"}),
}

MATRICES = ("SOAP", "SOAP-regions", "PSGDKron")


def trained(case, steps=3, shapes=SHAPES, compile="eager", **more):
    name, options = CASES[case]
    params = parameters(shapes)
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StateWarning)  # of param_ecc
        optimizer = hbcore.get(name)(named, lr=0.01, compile=compile, **{**options, **more})
    run(optimizer, params, gradients(steps, shapes, params[0].dtype))
    return params, optimizer


def states(params, optimizer):
    return [{k: v for k, v in optimizer.state[p].items() if k != "step"} for p in params]


WITHOUT = dict.fromkeys([(50,), (8, 3, 3, 3), (7, 33), ()])


@pytest.mark.parametrize(("shape", "blocks"), [*BLOCKS.items(), *WITHOUT.items()])
def test_blocks_are_cut_from_rows(shape, blocks):
    assert block_shape(torch.Size(shape)) == blocks
    if blocks is not None:
        x = torch.randn(shape)
        largest = block_amax(x)
        assert largest.shape == blocks and torch.equal(largest.flatten(), x.view(-1, BLOCK).amax(1))
        assert torch.equal(spread(largest, x).view(-1, BLOCK), largest.view(-1, 1).expand(-1, BLOCK))


def test_a_stack_of_slots_has_the_blocks_of_its_slots():
    for shape, blocks in BLOCKS.items():
        assert block_shape(torch.Size((4, *shape))) == (4, *blocks)


def test_a_root_code_is_0_for_0_alone_and_ends_at_the_largest():
    x = torch.tensor([0.0, 1e-45, 1e-3, 2.0, 2.0001, 6.0, 6.001, 65025.0, 1e9, float("inf"), float("nan")])
    assert root_code(x, 255).tolist() == [0, 1, 1, 1, 2, 2, 3, 255, 255, 255, 255]


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("SOAP", "SOAP-regions", "PSGDKron", "Muon", "LaProp-all")])
def test_what_is_made_of_blocks_has_a_scale_for_each_and_the_rest_is_plain(case):
    params, optimizer = trained(case)
    for p, state in zip(params, states(params, optimizer), strict=True):
        first = next(k for k in ("exp_avg", "momentum_buffer") if k in state)
        blocks = BLOCKS.get(tuple(p.shape))
        assert (f"{first}#scale" in state) == (blocks is not None)
        assert state[first].dtype == (torch.float32 if blocks is None else torch.int8)
        if blocks is not None:
            assert state[f"{first}#scale"].shape == blocks and state[f"{first}#scale"].dtype == torch.bfloat16


def test_slots_that_are_never_negative_are_stored_without_a_sign():
    params, optimizer = trained("AdamW")
    assert optimizer.state[params[0]]["exp_avg_sq"].dtype == torch.uint8
    assert optimizer.state[params[0]]["exp_avg_sq#scale"].dtype == torch.float32


@pytest.mark.parametrize("case", [c for c in CASES if c != "LaProp-all"])  # its reductions differ in the last bit
@pytest.mark.parametrize("backend", ["cpp", pytest.param("triton", marks=pytest.mark.broad)])
def test_backends_store_the_same_bits(case, backend):
    if case in MATRICES and backend == "triton":
        pytest.skip("their products take half a minute in Triton's interpreter")
    ours, one = trained(case, steps=2, compile=backend)
    theirs, other = trained(case, steps=2)
    assert one.report.backend == backend or case in ("Muon", *MATRICES)
    for mine, yours in zip(states(ours, one), states(theirs, other), strict=True):
        for name in mine:
            if mine[name].dtype in (torch.int8, torch.uint8):
                off = (mine[name].int() - yours[name].int()).abs()
                # the CPU's own square root is off by a bit, which a correction of a parameter shows
                rounded = case in ("Muon", *MATRICES, "AdamW-clipped") or "#" in name
                assert int(off.max()) <= rounded, name
                assert float((off > 0).float().mean()) < 0.01, name


@pytest.mark.full  # a minute of compiling
def test_inductor_stores_the_same_bits():
    ours, one = trained("AdamW", compile="inductor")
    theirs, other = trained("AdamW")
    for mine, yours in zip(states(ours, one), states(theirs, other), strict=True):
        assert all(torch.equal(mine[name], yours[name]) for name in mine)


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_exactly(case):
    name, options = CASES[case]
    dtype = torch.bfloat16 if "param_ecc" in options else torch.float32
    grads = list(gradients(4, SHAPES, dtype))

    def build(params):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StateWarning)
            return hbcore.get(name)([(f"p{i}", p) for i, p in enumerate(params)], lr=0.01, compile="eager", **options)

    resumes(build, lambda: parameters(SHAPES, dtype), lambda o, params, steps: run(o, params, [grads[i] for i in steps]), 4)


CONVERSIONS = [(None, "int8"), ("int8", None), ("bf16+8", "int8"), ("int8", "bf16+8"), ("int8", MIXED)]


@pytest.mark.parametrize(("before", "after"), CONVERSIONS)
def test_state_converts_with_a_note(before, after):
    params, first = trained("AdamW", ecc=before)
    second = hbcore.get("AdamW")([(f"p{i}", p) for i, p in enumerate(params)], lr=0.01, ecc=after, compile="eager")
    with pytest.warns(StateWarning, match="is converted to"):
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    for was, now in zip(hbcore.export(first)["state"].values(), hbcore.export(second)["state"].values(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            top = was[name].abs().max()
            assert float(((was[name] - now[name]).abs() / top).max()) <= 1e-2
    run(second, params, gradients(1, SHAPES))


def test_a_model_in_another_memory_format_stores_plainly_what_was_saved_by_blocks():
    params, first = trained("AdamW")
    formats = [torch.channels_last if p.ndim == 4 else torch.contiguous_format for p in params]
    turned = [nn.Parameter(p.detach().clone(memory_format=f)) for p, f in zip(params, formats, strict=True)]
    second = hbcore.get("AdamW")([(f"p{i}", p) for i, p in enumerate(turned)], lr=0.01, ecc="int8", compile="eager")
    with pytest.warns(StateWarning, match="is converted to"):
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state[turned[1]]["exp_avg"].dtype == torch.float32 and "exp_avg#scale" not in second.state[turned[1]]
    ours, theirs = hbcore.export(first)["state"], hbcore.export(second)["state"]
    assert all(torch.equal(ours[i][name], theirs[i][name]) for i in ours for name in ("exp_avg", "exp_avg_sq"))
    run(second, turned, gradients(1, SHAPES))
    assert second.state[turned[0]]["exp_avg"].dtype == torch.int8


def test_a_checkpoint_says_which_codec_each_slot_has():
    params, first = trained("AdamW-mixed")
    second = hbcore.get("AdamW")([(f"p{i}", p) for i, p in enumerate(params)], lr=0.01, ecc=dict(reversed(MIXED.items())))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(same(a.values(), b.values()) for a, b in zip(states(params, first), states(params, second), strict=True))
    lost = first.state_dict()
    del lost["state"][0]["exp_avg#scale"]
    with pytest.raises(CheckpointError, match="exp_avg"):
        second.load_state_dict(lost)


REFUSED = {
    "a slot that is none": (
        {"ecc": {"avg": "int8"}},
        "ecc names the slot 'avg'; this optimizer has exp_avg, exp_avg",
    ),
    "a slot with a sign": ({"ecc": {"exp_avg": "uint8"}}, "ecc='uint8' does not store the slot 'exp_avg': it may be negative"),
    "every slot without a sign": ({"ecc": "uint8"}, "does not store the slot 'exp_avg'"),
    "parameters": ({"param_ecc": "int8"}, "param_ecc='int8' stores state alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused_at_construction(case):
    options, said = REFUSED[case]
    with pytest.raises(OptionError, match=said):
        hbcore.get("AdamW")(parameters(SHAPES), lr=0.01, **options)


def test_a_slot_may_have_a_dtype_of_its_own():
    params = parameters(SHAPES)
    optimizer = hbcore.get("AdamW")(params, lr=0.01, ecc={"exp_avg": "bfloat16"}, compile="eager")
    run(optimizer, params, gradients(2, SHAPES))
    assert {optimizer.state[p]["exp_avg"].dtype for p in params} == {torch.bfloat16}
    assert {optimizer.state[p]["exp_avg_sq"].dtype for p in params} == {torch.float32}


def test_a_rule_may_not_look_at_blocks():
    @dataclass(frozen=True)
    class Peeks(Transform):
        name = "peeks"

        def update(self, u, s, c):
            return u / spread(block_amax(u.abs()), u), {}

    p = parameters(((4, 64),))
    optimizer = optimizer_of(Peeks)(p)
    with pytest.warns(hbcore.FallbackWarning, match="block_amax"):
        run(optimizer, p, gradients(1, ((4, 64),)))


def test_memory_is_told_before_anything_is_allocated():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32))
    told = hbcore.memory(model, "AdamW", ecc="int8")
    optimizer = hbcore.get("AdamW")(model.parameters(), ecc="int8", compile="eager")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert told.state == held
    weights = 64 * 96 + 96 * 32
    assert held == weights * (1 + 1 + 2 / 32 + 4 / 32) + (96 + 32) * 8
