"""The C++ backend against eager torch: whole trainings, with every option that changes what is computed.

The truth is the eager backend in float64, from the same start and with the same gradients, within 1e-6 of each tensor's norm.
What the codecs store must be eager float32's bits, but behind a square root: torch's on a CPU is not always the nearest.
"""

from __future__ import annotations

import pytest
import torch
from core.chains import CHAINS, EVERYTHING
from core.kit import distance, gradients, parameters, run, same
from torch import nn

import hbcore
from hb_adam import SGD, AdamW
from hbcore.engine.backends.base import Batch
from hbcore.engine.backends.cpp.backend import CppBackend
from hbcore.engine.backends.cpp.build import cpp_compiler
from hbcore.engine.backends.cpp.codegen import CHUNK
from hbcore.engine.backends.select import WORTH_GENERATING, candidates
from hbcore.errors import CompileError, FallbackWarning

pytestmark = [
    pytest.mark.skipif(cpp_compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:.*param_ecc:hbcore.errors.StateWarning"),
]
FP32 = 1e-6
SHAPES = ((2, 3, 4, 5), (7, 5), (5000,), (1,), (0, 3), (), (3, CHUNK))
"""Channels-last, transposed, a view that starts in the middle of another tensor, one element, none, 0-d, several chunks."""


QUICK = {
    "adamw-plain", "adamw-everything", "adamw-atan2", "sgd-capturable-everything", "SFAdamW", "Adafactor", "SOAP", "AdamW",
    "state-8", "drawn",
}  # fmt: skip


def some(names):
    """Cases for ``pytest.mark.parametrize``: in ``make test``, those of each kind."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in names]


def trained(cls, options, backend, dtype=torch.float32, count=3, shapes=SHAPES):
    """Parameters of every layout after some steps, and their optimizer."""
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters(shapes)]
    base = None
    if shapes is SHAPES:
        image, matrix, vector, *rest = (p.detach() for p in params)
        base = torch.cat([torch.full((1,), 77.0, dtype=dtype), vector, torch.full((1,), 77.0, dtype=dtype)])
        image = image.to(memory_format=torch.channels_last)
        params = [nn.Parameter(p) for p in (image, matrix.t().contiguous().t(), base[1:-1], *rest)]
    optimizer = cls(params, lr=0.05, **options, compile=backend)
    for grads in gradients(count, shapes, torch.float32):
        run(optimizer, params, [[g.to(p.dtype) for p, g in zip(params, grads, strict=True)]])
    assert optimizer.report.backend == backend and not optimizer.report.reasons
    assert base is None or base[0] == base[-1] == 77  # the neighbours of a view
    return params, optimizer


def state(optimizer, *prefixes):
    """Every tensor of the state, or those whose names start so."""
    return [s[name] for s in optimizer.state.values() for name in sorted(s) if name.startswith(prefixes or "")]


@pytest.mark.parametrize("chain", some(CHAINS))
def test_it_agrees_with_float64(chain):
    cls, options = CHAINS[chain]
    ours, optimizer = trained(cls, options, "cpp")
    exact, reference = trained(cls, options, "eager", torch.float64)
    assert distance([*ours, *state(optimizer)], [*exact, *state(reference)]) <= FP32


@pytest.mark.parametrize("chain", some(["adamw-atan2", "adamw-everything", "sgd-nesterov"]))
def test_it_computes_float64_parameters_in_float64(chain):
    cls, options = CHAINS[chain]
    ours, optimizer = trained(cls, options, "cpp", torch.float64)
    exact, reference = trained(cls, options, "eager", torch.float64)
    assert distance([*ours, *state(optimizer)], [*exact, *state(reference)]) <= 1e-13


OPTIMIZERS = {
    "SFAdamW": {"weight_decay": 0.1}, "AdEMAMix": {}, "Lion": {"caution": True}, "NAdam": {}, "RMSprop": {}, "Adafactor": {},
    "Muon": {"mars": True}, "SOAP": {"update_clipping": "l2_clip_"}, "PSGDKron": {}, "MSAMLaProp": {}, "ADOPT": {},
    "AdamW": {"palm": True, "skip_nonfinite": True, "use_ema": True},
}  # fmt: skip


@pytest.mark.parametrize("name", some(OPTIMIZERS))
def test_optimizers_of_each_kind_agree_with_eager_ones(name):
    """float32 against float32: a matrix rule turns the last bits of its factors into more."""
    cls, shapes = hbcore.get(name), ((24, 16), (16,), (8, 4, 3, 3), (5000,))
    ours, optimizer = trained(cls, OPTIMIZERS[name], "cpp", shapes=shapes)
    theirs, reference = trained(cls, OPTIMIZERS[name], "eager", shapes=shapes)
    assert distance(ours, theirs) <= 4 * FP32
    for s, t in zip(optimizer.state.values(), reference.state.values(), strict=True):
        for key in (k for k in s if isinstance(s[k], torch.Tensor) and s[k].is_floating_point() and s[k].numel()):
            assert torch.allclose(s[key].float(), t[key].float(), rtol=1e-4, atol=1e-5 * float(t[key].abs().max())), key


CODECS = {
    "state-8": {"ecc": "bf16+8"}, "state-16": {"ecc": "bf16+16"}, "both": {"ecc": "bf16+8", "param_ecc": "bf16+8"},
    "parameters-16": {"param_ecc": "bf16+16", "weight_decay": 0.1}, "bfloat16": {"storage_dtype": "bfloat16"},
    "drawn": {"ecc": "bf16+8", "param_ecc": "bf16+8", "stochastic_rounding": True},
    "drawn-bfloat16": {"storage_dtype": "bfloat16", "stochastic_rounding": True},
}  # fmt: skip


@pytest.mark.parametrize("cls", [AdamW, SGD])
@pytest.mark.parametrize("codec", some(CODECS))
def test_codecs_store_the_same_bits(codec, cls):
    ours, optimizer = trained(cls, CODECS[codec], "cpp", count=5)
    theirs, reference = trained(cls, CODECS[codec], "eager", count=5)
    assert same(state(optimizer, "exp_avg", "momentum_buffer"), state(reference, "exp_avg", "momentum_buffer"))
    assert any(t.dtype != torch.float32 for t in (*ours, *state(optimizer)))  # or this compares something else
    if cls is SGD:
        assert same([*ours, *state(optimizer)], [*theirs, *state(reference)])
    else:
        assert distance(ours, theirs) <= (FP32 if ours[0].dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_parameters_are_rounded_as_torch_rounds_them(dtype):
    ours, optimizer = trained(SGD, {"weight_decay": 0.1}, "cpp", dtype)
    theirs, reference = trained(SGD, {"weight_decay": 0.1}, "eager", dtype)
    assert same([*ours, *state(optimizer)], [*theirs, *state(reference)])


def test_no_bit_depends_on_the_number_of_threads():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            params, optimizer = trained(
                AdamW, {**EVERYTHING, "ecc": "bf16+8"}, "cpp", shapes=((7, CHUNK), (4 * CHUNK + 5,), (9,))
            )
        finally:
            torch.set_num_threads(before)
        results.append([*params, *state(optimizer)])
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("options", [{}, {"caution": True, "gradient_clipping": "global_l2norm_clip"}, {"capturable": True}])
def test_gradients_groups_and_numbers_that_change_compile_nothing(options):
    shapes = [(3000,), (5, 7), (), (9,), (4, 4), (2500,)]

    def eventful(backend, dtype):
        params = [nn.Parameter(p.detach().to(dtype)) for p in parameters(shapes)]
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.3, "weight_decay": 0.2}]
        optimizer, kept, compiled = AdamW(groups, lr=0.02, **options, compile=backend), [], set()
        for step, grads in enumerate(gradients(7, shapes, torch.float32)):
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                p.grad = None if i in {1: (0, 3, 4), 3: (2,), 5: (4, 5)}.get(step, ()) else g.to(dtype, copy=True)
                kept.append(p.grad)  # so that no gradient gets the address of an earlier one
            if step == 4:
                params[0].data = params[0].detach().clone()
            optimizer.param_groups[0]["lr"] *= 0.9
            optimizer.param_groups[1]["eps"] = 1e-6 * (step + 1)
            optimizer.step()
            compiled.add(optimizer.report.compiles)
        assert optimizer.report.backend == backend and len(compiled) == 1
        return [*params, *state(optimizer)]

    assert distance(eventful("cpp", torch.float32), eventful("eager", torch.float64)) <= FP32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_number_that_is_not_finite_is_skipped(value):
    params = parameters([(40, 50), (7,)])
    optimizer = AdamW(params, skip_nonfinite=True, compile="cpp")
    run(optimizer, params, gradients(1, [(40, 50), (7,)]))
    before = [t.clone() for t in (*params, *state(optimizer, "exp_avg"))]
    [grads] = gradients(1, [(40, 50), (7,)])
    grads[0][39, 49] = value
    run(optimizer, params, [grads])
    assert same(before, [*params, *state(optimizer, "exp_avg")])


@pytest.mark.parametrize(
    ("choice", "device", "names"),
    [
        ("auto", "cpu", ["cpp", "inductor", "eager"]),
        ("auto", "cuda", ["triton", "inductor", "eager"]),
        ("triton", "cpu", ["triton", "cpp", "inductor", "eager"]),
        ("cpp", "cuda", ["cpp", "inductor", "eager"]),
    ],
)
def test_it_is_tried_first_on_cpus_and_elsewhere_only_if_asked_for(choice, device, names):
    assert [b.name for b in candidates(choice, torch.device(device), WORTH_GENERATING)] == names


def test_a_small_model_compiles_nothing_by_itself():
    assert [b.name for b in candidates("auto", torch.device("cpu"), WORTH_GENERATING - 1)] == ["eager"]


def test_without_a_compiler_only_the_one_that_was_asked_for_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    params = parameters()
    optimizer = AdamW(params, compile="cpp")
    with pytest.warns(FallbackWarning) as said:
        run(optimizer, params, gradients(1))
    [text] = [str(w.message) for w in said if w.category is FallbackWarning]
    assert text.startswith("cpp does not run here: there is no C++ compiler on PATH (g++ or clang++)")
    assert "eager runs instead" in text and optimizer.report.backend == "eager"


def test_parameters_that_are_on_no_cpu_are_refused():
    batch = Batch({"param": [torch.empty(3, device="meta")], "grad": []}, [], [])
    with pytest.raises(CompileError, match="runs on a CPU, and the parameters are not on one"):
        CppBackend().compile(None, batch)


def test_a_chain_has_one_source():
    """Or every process would compile it anew. Nodes are hashed by their addresses, which differ."""
    from hbcore.engine.backends.cpp.codegen import module_source

    made = set()
    for _ in range(8):
        p = nn.Parameter(torch.zeros(64, 64))
        optimizer = hbcore.get("AdamW")([p], ecc="int8", caution=True, mars=True, compile="eager")
        p.grad = torch.zeros_like(p)
        optimizer.step()
        [segment] = optimizer.core.plan.segments.values()
        made.add(module_source(segment.program, "chain", "0"))
    assert len(made) == 1
