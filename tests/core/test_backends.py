"""The Triton and Inductor backends against the eager one, and what each of them compiles and launches.

Triton's kernels run under its interpreter here, on the CPU; ``tests/gpu`` has the same questions for a GPU. The truth is the
eager backend in float64, from the same start and with the same gradients: float32 must come within 1e-6 of each tensor's
norm. bfloat16 and float16 parameters are rounded at each step, and may differ by one unit in the last place in a few
elements. What the integer codecs store of the state must be the same bits as eager float32's. So must be whole trainings, if
they take no square root: torch's own on a CPU is MKL's, which is not the nearest float32 in half a per cent of all cases.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from core.chains import CHAINS, EVERYTHING
from core.kit import distance, gradients, optimizer_of, parameters, run, same, train, values
from core.kit import mlp as small_model
from rounding import unit
from torch import nn

from hb_adam import SGD, AdamW
from hbcore.api import Domain, Transform, zeros
from hbcore.engine.backends.triton import backend as triton_backend
from hbcore.errors import FallbackWarning, StateWarning

pytest.importorskip("triton")
helpers = pytest.importorskip("hbcore.engine.backends.triton.device_lib")
pytestmark = [
    pytest.mark.skipif(not helpers.INTERPRETED, reason="runs under Triton's interpreter; tests/gpu is for GPUs"),
    pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning"),  # the interpreter divides with NumPy
    pytest.mark.filterwarnings("ignore:.*param_ecc:hbcore.errors.StateWarning"),
]

FP32 = 1e-6
every_chain = pytest.mark.parametrize("chain", CHAINS)

CHUNKS = {name: size for name, size in vars(triton_backend).items() if name.startswith("CHUNK")}

SHAPES = ((2, 3, 4, 5), (7, 5), (5000,), (1,), (0, 3), ())
"""Channels-last, transposed, a view that starts in the middle of another tensor, one element, none, 0-d."""


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that a few thousand elements are several of them. A masked-out block costs the interpreter time too."""
    for name in CHUNKS:
        monkeypatch.setattr(triton_backend, name, 2048)


def layouts(dtype):
    """Parameters of every kind of memory, and the tensors that two of them are views of."""
    image, matrix, vector, *rest = values(parameters(SHAPES, dtype))
    base = torch.cat([torch.full((1,), 77.0, dtype=dtype), vector, torch.full((1,), 77.0, dtype=dtype)])
    made = [image.to(memory_format=torch.channels_last), matrix.t().contiguous().t(), base[1:-1], *rest]
    return [nn.Parameter(p) for p in made], base


def steps_for(params, count=3, shapes=SHAPES):
    """The same float32 gradients for every dtype: the float64 run must not see digits that the others cannot."""
    for grads in gradients(count, shapes, torch.float32):
        yield [g.to(p.dtype) for p, g in zip(params, grads, strict=True)]


def trained(cls, options, backend, dtype=torch.float32, count=3):
    """Parameters of every layout after some steps, and their optimizer."""
    params, base = layouts(torch.float32)
    if dtype != torch.float32:
        params = [nn.Parameter(p.detach().to(dtype)) for p in params]
    optimizer = cls(params, lr=0.05, **options, compile=backend)
    run(optimizer, params, steps_for(params, count))
    assert optimizer.report.backend == backend and not optimizer.report.reasons
    assert base[0] == base[-1] == 77  # neighbours of a view are none of the kernel's business
    return params, optimizer


def state(optimizer, *prefixes):
    """Every tensor of the state, or those whose names start so."""
    return [s[name] for s in optimizer.state.values() for name in sorted(s) if name.startswith(prefixes or "")]


def ulps_apart(ours, theirs):
    """How many representable numbers lie between two tensors of 16-bit floats, element by element."""
    ordered = [torch.where(b < 0, -32768 - b, b) for b in (t.detach().view(torch.int16).int() for t in (ours, theirs))]
    return (ordered[0] - ordered[1]).abs()


# --- the same numbers --------------------------------------------------------------------------------------------------


@every_chain
def test_triton_agrees_with_float64(chain, small_chunks):
    cls, options = CHAINS[chain]
    params, optimizer = trained(cls, options, "triton")
    exact, reference = trained(cls, options, "eager", torch.float64)
    assert distance(params, exact) <= FP32
    assert distance(state(optimizer), state(reference)) <= FP32


@pytest.mark.parametrize("chain", ["adamw-decay", "adamw-atan2", "adamw-everything", "sgd-nesterov"])
def test_triton_computes_float64_parameters_in_float64(chain, small_chunks):
    cls, options = CHAINS[chain]
    params, optimizer = trained(cls, options, "triton", torch.float64)
    exact, reference = trained(cls, options, "eager", torch.float64)
    # atan2 is a polynomial of float32's precision
    assert distance([*params, *state(optimizer)], [*exact, *state(reference)]) <= (1e-8 if "atan2" in chain else 1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chain", ["adamw-plain", "adamw-everything", "sgd-decay"])
def test_low_precision_parameters_differ_by_an_ulp_at_most(chain, dtype, small_chunks):
    cls, options = CHAINS[chain]
    ours, optimizer = trained(cls, options, "triton", dtype)
    theirs, reference = trained(cls, options, "eager", dtype)
    apart = torch.cat([ulps_apart(a, b).flatten() for a, b in zip(ours, theirs, strict=True)])
    assert apart.max() <= 1
    assert apart.float().mean() < 1e-3
    assert distance(state(optimizer), state(reference)) <= 1e-3 * torch.finfo(dtype).eps


CODECS = {
    "state-8": {"ecc": "bf16+8"},
    "state-16": {"ecc": "bf16+16"},
    "both": {"ecc": "bf16+8", "param_ecc": "bf16+8"},
    "parameters-16": {"param_ecc": "bf16+16", "weight_decay": 0.1},
    "bfloat16": {"storage_dtype": "bfloat16"},
}
STORED = {"state-16": {torch.int16}, "parameters-16": {torch.int16}, "bfloat16": set()}
STORED |= {"state-8": {torch.int8}, "both": {torch.int8}}


@pytest.mark.parametrize("cls", [AdamW, SGD])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_store_the_same_bits(codec, cls, small_chunks):
    ours, optimizer = trained(cls, CODECS[codec], "triton", count=5)
    theirs, reference = trained(cls, CODECS[codec], "eager", count=5)
    assert {s.dtype for s in state(optimizer)} & {torch.int8, torch.int16} == STORED[codec]  # or this compares something else
    assert same(state(optimizer, "exp_avg", "momentum_buffer"), state(reference, "exp_avg", "momentum_buffer"))
    if cls is SGD:
        assert same([*ours, *state(optimizer)], [*theirs, *state(reference)])
    elif ours[0].dtype == torch.float32:
        assert distance(ours, theirs) <= FP32
    else:
        assert max(int(ulps_apart(a, b).max()) for a, b in zip(ours, theirs, strict=True) if a.numel()) <= 1


@pytest.mark.parametrize(
    "options", [{"caution": True, "ecc": "bf16+8"}, {**EVERYTHING, "ecc": "bf16+8", "param_ecc": "bf16+8"}]
)
def test_a_codec_behind_reductions(options, small_chunks):
    """The last bits of a sum of floats depend on their order, and so may the last bit of a correction: in few elements."""
    ours, optimizer = trained(AdamW, options, "triton")
    theirs, reference = trained(AdamW, options, "eager")
    read = optimizer.settings.codec.read
    for slot in ("exp_avg", "exp_avg_sq"):
        logical = [
            torch.cat([read(o.state[p], slot, torch.float32).flatten() for p in ps if p.numel()])
            for o, ps in ((optimizer, ours), (reference, theirs))
        ]
        assert (logical[0] != logical[1]).float().mean() < 0.1
        assert distance(logical[:1], logical[1:]) <= 2**-15 * 0.1**0.5  # a tenth is off by the last of sixteen bits
    assert distance(ours, theirs) <= (FP32 if ours[0].dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize(
    ("cls", "options", "sizes"),
    [
        (AdamW, {}, {*CHUNKS.values(), 8192, 32768}),
        (SGD, {"ecc": "bf16+16"}, {*CHUNKS.values()}),
        (SGD, {"caution": True}, {CHUNKS["CHUNK_REDUCED"]}),
    ],
)
def test_sizes_around_the_ends_of_chunks(cls, options, sizes):
    shapes = [(size + d,) for size in sizes for d in (-1, 0, 1)]
    ours, exact = parameters(shapes), [nn.Parameter(p.detach().double()) for p in parameters(shapes)]
    run(cls(ours, **options, compile="triton"), ours, steps_for(ours, 1, shapes))
    run(cls(exact, **options, compile="eager"), exact, steps_for(exact, 1, shapes))
    assert distance(ours, exact) <= FP32
    assert distance([p[-1:] for p in ours], [p[-1:] for p in exact]) <= FP32  # the last element of a last chunk, by itself


def test_inductor_agrees_with_float64():
    options = {**EVERYTHING, "gradient_clipping": None, "update_clipping": None}  # one reduction: two graphs
    ours, optimizer = trained(AdamW, options, "inductor")
    exact, reference = trained(AdamW, options, "eager", torch.float64)
    assert distance([*ours, *state(optimizer)], [*exact, *state(reference)]) <= FP32


def test_inductor_stores_the_codecs_bits():
    ours, optimizer = trained(AdamW, CODECS["state-8"], "inductor", count=5)
    theirs, reference = trained(AdamW, CODECS["state-8"], "eager", count=5)
    assert same(state(optimizer), state(reference))
    assert distance(ours, theirs) <= FP32


# --- what changes between steps ---------------------------------------------------------------------------------------


def eventful(backend, options, dtype=torch.float32):
    """A training in which groups, gradients, their addresses and the numbers all change."""
    shapes = [(3000,), (5, 7), (), (9,), (4, 4), (2500,)]
    params = [nn.Parameter(p.detach().to(dtype)) for p in parameters(shapes)]
    groups = [{"params": params[:2]}, {"params": params[2:4], "lr": 0.3, "weight_decay": 0.2}]
    optimizer = AdamW(groups, lr=0.02, **options, compile=backend)
    kept = []
    for step, grads in enumerate(gradients(8, shapes, torch.float32)):
        if step == 2:
            optimizer.add_param_group({"params": params[4:], "lr": 0.1, "betas": (0.8, 0.9)})
        for i, (p, g) in enumerate(zip(params[: 4 if step < 2 else 6], grads, strict=False)):
            missing = step in {1: (0, 3, 4), 3: (2,), 5: (4, 5, 6)}.get(i, ())
            p.grad = None if missing else g.to(dtype, copy=True)
            kept.append(p.grad)  # so that no gradient gets the address of an earlier one
        if step == 4:  # an address that is no multiple of 16
            params[0].grad = torch.cat([torch.zeros(1, dtype=dtype), params[0].grad])[1:]
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.param_groups[1]["eps"] = 1e-6 * (step + 1)
        optimizer.step()
    counts = [int(optimizer.state[p]["step"]) for p in params]
    assert counts == [8, 5, 8, 7, 6, 3]
    return params, optimizer


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("inductor", {}),
        ("triton", {}),
        ("triton", {"caution": True, "gradient_clipping": "global_l2norm_clip"}),
        ("triton", {"capturable": True}),
    ],
)
def test_an_eventful_training(backend, options, small_chunks):
    ours, optimizer = eventful(backend, options)
    exact, reference = eventful("eager", options, torch.float64)
    assert optimizer.report.backend == backend
    assert distance([*ours, *state(optimizer)], [*exact, *state(reference)]) <= FP32


def test_parameters_that_are_not_dense_run_eagerly_beside_triton():
    base = torch.ones(40)
    params, plain = [nn.Parameter(base[::2]), *parameters([(30,)])], [nn.Parameter(torch.ones(20)), *parameters([(30,)])]
    optimizer = AdamW(params, compile="triton")
    run(optimizer, params, gradients(2, [(20,), (30,)]))
    run(AdamW(plain, compile="eager"), plain, gradients(2, [(20,), (30,)]))
    assert distance(params, plain) <= FP32 and bool((base[1::2] == 1).all())
    assert optimizer.report.backend == "eager+triton"
    assert any("not dense" in note for note in optimizer.report.notes)


# --- what is compiled and launched --------------------------------------------------------------------------------------


def counts(optimizer):
    return optimizer.report.programs, optimizer.report.compiles, optimizer.report.launches


def stepped(params, options, cls=AdamW, **more):
    optimizer = cls(params, **options, **more, compile="triton")
    run(optimizer, params, [[torch.ones_like(p) for p in params]])
    assert optimizer.report.backend == "triton"
    return optimizer


@pytest.mark.parametrize("number", [5, 50])
@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({}, 1),
        ({"weight_decay": 0.1, "cautious_weight_decay": True, "ecc": "bf16+8"}, 1),
        ({"caution": True}, 2),
        ({"update_clipping": "l2_clip_"}, 2),
        ({"gradient_clipping": "global_l2norm_clip"}, 2),
        (EVERYTHING, 4),
    ],
)
def test_one_kernel_and_one_launch_a_phase_however_many_tensors(options, phases, number, small_chunks):
    params = parameters([(i % 7 + 1, 3) for i in range(number)])
    assert counts(stepped(params, options)) == (1, phases, phases)


def test_groups_share_a_kernel_and_dtypes_do_not():
    params = parameters([(6,)] * 4)
    optimizer = AdamW([{"params": [p], "lr": 0.1 * i, "betas": (0.1 * i, 0.9)} for i, p in enumerate(params)], compile="triton")
    run(optimizer, params, gradients(2, [(6,)] * 4))
    assert counts(optimizer) == (1, 1, 1)
    mixed = [*params, nn.Parameter(torch.ones(6, dtype=torch.bfloat16))]
    assert counts(stepped(mixed, {})) == (2, 2, 2)


@pytest.mark.parametrize(("options", "phases"), [({}, 1), ({"caution": True}, 2)])
def test_unaligned_tensors_add_one_variant_whatever_their_number(options, phases, small_chunks):
    def views(n):
        return [nn.Parameter(torch.ones(10)[1:]) for _ in range(n)]

    assert counts(stepped([*parameters([(9,)] * 2), *views(3)], options)) == (1, 2 * phases, 2 * phases)
    assert counts(stepped(views(3), options)) == (1, phases, phases)


def test_a_gradient_that_becomes_unaligned_compiles_its_variant_once(small_chunks):
    params = parameters([(9,)])
    optimizer = stepped(params, {})
    seen = []
    for aligned in (True, False, True, False):
        params[0].grad = torch.ones(9) if aligned else torch.ones(10)[1:]
        optimizer.step()
        seen.append(counts(optimizer))
    assert seen == [(1, 1, 1), (1, 2, 1), (1, 2, 1), (1, 2, 1)]


@pytest.mark.parametrize("capturable", [False, True])
def test_scheduling_every_number_compiles_nothing(capturable, small_chunks):
    params = parameters([(5, 7), (1,)])
    options = {"weight_decay": 0.1, "mars": True, "caution": True, "warmup_steps": 3, "capturable": capturable}
    optimizer = AdamW(params, **options, compile="triton")
    seen = set()
    for step, grads in enumerate(gradients(6, [(5, 7), (1,)])):
        [group] = optimizer.param_groups
        group.update(lr=0.1 / (step + 1), betas=(0.1 * step, 0.9 + step / 100), eps=10.0**-step, weight_decay=0.1 * step)
        group.update(mars_gamma=0.01 * step, warmup_steps=step)
        run(optimizer, params, [grads])
        seen.add(counts(optimizer))
    assert seen == {(1, 2, 2)}


def test_a_structural_change_does_compile():
    params = parameters([(5,)])
    optimizer = stepped(params, {}, cls=SGD)
    optimizer.param_groups[0]["nesterov"] = True
    run(optimizer, params, [[torch.ones(5)]])
    assert counts(optimizer) == (2, 2, 1)


# --- falling back and letting go ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Erf(Transform):
    """Elementwise, so it traces; and not in the generator's vocabulary."""

    name = "erf"

    def update(self, u, s, c):
        return torch.erf(u), {}


@dataclass(frozen=True)
class LargestOne(Transform):
    """A maximum over the tensor, and one over the model."""

    name = "largest"
    domain = Domain.TENSOR

    def update(self, u, s, c):
        return u / c.amax(u.abs()), {}


@dataclass(frozen=True)
class LargestOfAll(LargestOne):
    name = "largest_of_all"
    domain = Domain.MODEL


def test_an_operation_outside_the_vocabulary_goes_to_the_next_backend_with_one_warning():
    shapes = [(5, 7), (3,)]
    params, start = parameters(shapes), values(parameters(shapes))
    optimizer = optimizer_of(Erf)(params, lr=0.1, compile="triton")
    grads = list(gradients(3, shapes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, params, grads)
    [told] = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    for word in ("triton", "aten.erf", "test_backends.py", "cpp runs instead"):
        assert word in told
    assert optimizer.report.backend == "cpp"
    assert [told.startswith(reason) for reason in optimizer.report.reasons] == [True]
    wanted = [p - 0.1 * sum(torch.erf(g[i].double()) for g in grads) for i, p in enumerate(start)]
    assert distance(params, wanted) <= FP32


@pytest.mark.parametrize("rule", [LargestOne, LargestOfAll])
@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
def test_maxima_hide_no_nan(rule, poison, small_chunks):
    shapes = [(5000,), (3,), (1,)]
    [grads] = gradients(1, shapes)
    if poison is not None:
        grads[0][4567] = poison
    results = []
    for backend in ("triton", "eager"):
        params = parameters(shapes)
        run(optimizer_of(rule)(params, compile=backend), params, [grads])
        results.append(params)
    few = 16 * unit(torch.float32)  # weights of up to 4, rounded once by each
    assert all(torch.allclose(a, b, rtol=0, atol=few, equal_nan=True) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("options", [{}, {"caution": True, "ecc": "bf16+8"}, {"capturable": True}])
def test_parameters_gradients_and_state_are_freed_with_the_optimizer(options, small_chunks):
    model = small_model()
    optimizer = AdamW(model.parameters(), **options, compile="triton")
    train(model, optimizer, range(2))
    assert optimizer.report.backend == "triton"
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    watched = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.step()
    assert [w() for w in watched] == [None] * len(watched)  # used gradients go at once
    watched = [weakref.ref(p) for p in model.parameters()]
    watched += [weakref.ref(t) for s in optimizer.state.values() for t in s.values()]
    del model, optimizer, p
    gc.collect()
    assert [w() for w in watched] == [None] * len(watched)


def test_param_ecc_says_what_it_does(small_chunks):
    with pytest.warns(StateWarning, match="param_ecc turned 6 float32 parameters"):
        trained(AdamW, {"param_ecc": "bf16+8"}, "triton", count=1)


def test_param_ecc_takes_a_gradient_that_is_there_already_along():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    p.grad = torch.tensor([0.5, -0.5])
    with pytest.warns(StateWarning, match="param_ecc"):
        optimizer = AdamW([p], lr=0.1, param_ecc="bf16+8")
    assert p.dtype == p.grad.dtype == torch.bfloat16
    optimizer.step()
    assert p[0] < 1 and p[1] > 2 and p.grad is None


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_state_whose_memory_was_swapped_is_read_where_it_is_now(backend, small_chunks):
    """``tensor.data = ...`` moves memory and keeps the tensor, as code that offloads state to the host does."""
    params, plain = parameters([(40,)]), parameters([(40,)])
    optimizer, reference = (AdamW(ps, compile=backend) for ps in (params, plain))
    [first, second] = [[g] for [g] in gradients(2, [(40,)])]
    run(optimizer, params, [first])
    run(reference, plain, [first])
    optimizer.state[params[0]]["exp_avg"].data = optimizer.state[params[0]]["exp_avg"].clone()
    run(optimizer, params, [second])
    run(reference, plain, [second])
    assert same(state(optimizer), state(reference)) and same(params, plain)


@dataclass(frozen=True)
class Twins(Transform):
    """Two slots whose names look alike in a generated kernel."""

    name = "twins"

    def slots(self, param):
        return {"a.b": zeros(param), "a_b": zeros(param)}

    def update(self, u, s, c):
        return u + s["a.b"] + 10 * s["a_b"], {"a.b": s["a.b"] + u, "a_b": s["a_b"] - 2 * u}


@pytest.mark.parametrize("codec", [{}, {"ecc": "bf16+8", "stochastic_rounding": True}], ids=str)
def test_slots_whose_names_look_alike_are_kept_apart(codec):
    ours, optimizer = trained(optimizer_of(Twins), codec, "triton")
    theirs, reference = trained(optimizer_of(Twins), codec, "eager")
    assert distance([*ours, *state(optimizer)], [*theirs, *state(reference)]) < 1e-6
