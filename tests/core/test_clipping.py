"""Every clipping at several thresholds, before and after a rule, on every backend, against float64 oracles."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, fields

import pytest
import torch
from core.kit import combined, distance, gradients, parameters, run, same, values
from reference import clipping as oracle
from rounding import unit
from torch import nn

from hbcore.api import Optimizer, Transform
from hbcore.errors import HyperparameterError, OptionError
from hbcore.rules import clipping

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from inside Triton's interpreter

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: unit(torch.bfloat16)}  # each new weight is rounded once
BACKENDS = ("eager", "triton")
GLOBAL = ("global_l2norm_clip", "global_rmsnorm_clip")
CASES = [(name, t) for name in clipping.CLIPS for t in (0.05, 1.0, 5.0) if (name, t) != ("a_law_compress", 0.05)]


@dataclass(frozen=True)
class Cube(Transform):
    """A rule that does not commute with any clip."""

    name = "cube"

    def update(self, u, s, c):
        return u * u * u, {}


class Cubed(Optimizer):
    """``p - lr * clip_update(clip_gradient(g)^3)``."""

    def __init__(self, params, lr=0.1, gradient_clipping=None, update_clipping=None, **options):
        own = {"lr": lr, "gradient_clipping": gradient_clipping, "update_clipping": update_clipping}
        super().__init__(params, own, options)

    @staticmethod
    def chain(h):
        before = clipping.resolve(h.gradient_clipping, "clip_gradient")
        after = clipping.resolve(h.update_clipping, "clip_update")
        return tuple(t for t in (after, before, Cube()) if t)  # out of order: the stages decide


def expected(params, steps, stage, name, *numbers, lr=0.1):
    """The oracle's parameters after ``steps``."""
    clip = oracle.BY_NAME[name]
    p = [x.detach().double().numpy() for x in params]
    for step in steps:
        u = [g.double().numpy() for g in step]
        u = [x**3 for x in clip(u, p, *numbers)] if stage == "gradient_clipping" else clip([x**3 for x in u], p, *numbers)
        p = [a - lr * b for a, b in zip(p, u, strict=True)]
    return [torch.tensor(a) for a in p]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.float64), pytest.param("triton", torch.float32, marks=pytest.mark.broad)]
)
@pytest.mark.parametrize("stage", clipping.STAGES.values())
@pytest.mark.parametrize(("name", "threshold"), CASES)
def test_each_clip_at_each_threshold(name, threshold, stage, dtype, backend):
    params, steps = parameters(dtype=dtype), list(gradients(4, dtype=dtype))
    wanted = expected(params, steps, stage, name, threshold)
    optimizer = Cubed(params, compile=backend, **{stage: (name, threshold)})
    run(optimizer, params, steps)
    assert optimizer.report.backend == backend
    assert distance(params, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "backend"),
    combined(
        clipping.CLIPS,
        ["inductor", "triton"],
        compiled=[("l2_clip_", "inductor")],
    ),
)
def test_each_clip_by_its_name_alone(name, backend):
    dtype = {"inductor": torch.float32, "triton": torch.float64}[backend]
    params, steps = parameters(dtype=dtype), list(gradients(2, dtype=dtype))
    wanted = expected(params, steps, "update_clipping", name)
    optimizer = Cubed(params, compile=backend, update_clipping=name)
    run(optimizer, params, steps)
    assert optimizer.report.backend == backend
    assert distance(params, wanted) <= TOLERANCE[dtype]


def test_defaults_are_the_documented_ones():
    numbers = {n: {f.name: getattr(c(), f.name) for f in fields(c) if f.name != "at"} for n, c in clipping.CLIPS.items()}
    assert numbers == {
        "l2_clip_": {"threshold": 1.0},
        "rmsnorm_clip_": {"threshold": 1.0},
        "global_l2norm_clip": {"threshold": 1.0},
        "global_rmsnorm_clip": {"threshold": 1.0},
        "adaptive_gradient_clipping_": {"threshold": 0.1},
        "trust_region_clip_": {"bound": 2.0, "scale": 1.5, "lerp": 0.9},
        "a_law_compress": {"a": 87.6},
        "mu_law_compress": {"mu": 127.0},
        "softsign_compress": {"bound": 2.0},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GLOBAL)
def test_global_means_all_groups_dtypes_and_alignments(name, backend):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float32)
    params = [nn.Parameter(torch.linspace(-1, 1, n).to(d)) for n, d in zip((7, 33, 20, 9), dtypes, strict=True)]
    params[3] = nn.Parameter(torch.linspace(-1, 1, 10)[1:])  # not aligned to 16 bytes
    idle = nn.Parameter(torch.ones(1000))
    steps = [[torch.linspace(-k, 2, p.numel()).to(p.dtype) for p in params] for k in (1, 3)]
    groups = [{"params": [params[0], params[2]], "lr": 1.0}, {"params": [params[1], idle, params[3]], "lr": 0.1}]
    optimizer = Cubed(groups, compile=backend, gradient_clipping=(name, 0.7))
    for step in steps:
        by_lr = {lr: expected(params, [step], "gradient_clipping", name, 0.7, lr=lr) for lr in (1.0, 0.1)}
        wanted = [by_lr[1.0][0], by_lr[0.1][1], by_lr[1.0][2], by_lr[0.1][3]]
        run(optimizer, params, [step])
        assert all(distance([p], [w]) <= max(TOLERANCE[p.dtype], 1e-6) for p, w in zip(params, wanted, strict=True))
    assert optimizer.report.backend == backend
    assert torch.equal(idle.detach(), torch.ones(1000))


def test_the_global_l2_clip_is_torchs():
    ours, theirs = parameters(), parameters()
    [step] = gradients(1)
    run(Cubed(ours, gradient_clipping="global_l2norm_clip"), ours, [step])
    for p, g in zip(theirs, step, strict=True):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(theirs, 1.0)
    assert distance(ours, [p.detach() - 0.1 * p.grad**3 for p in theirs]) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["l2_clip_", "rmsnorm_clip_", *GLOBAL])
def test_what_is_within_the_threshold_comes_back_bit_for_bit(name, backend):
    """A clip is not a normalisation; 1 / 0.05 * 0.05 is not 1 in float32 either."""
    clipped, plain = parameters(), parameters()
    steps = [[g * 1e-3 for g in step] for step in gradients(5)]  # one step of which is all zero
    run(Cubed(clipped, compile=backend, gradient_clipping=(name, 0.05)), clipped, steps)
    run(Cubed(plain, compile=backend), plain, steps)
    assert same(values(clipped), values(plain))


def test_both_sides_at_once_with_one_formula():
    params, steps = parameters(), list(gradients(2))
    wanted = [p.detach().double().numpy() for p in params]
    for step in steps:
        inner = [x**3 for x in oracle.l2([g.double().numpy() for g in step], wanted, 2.0)]
        wanted = [a - 0.1 * b for a, b in zip(wanted, oracle.l2(inner, wanted, 0.5), strict=True)]
    optimizer = Cubed(params, gradient_clipping=("l2_clip_", 2.0), update_clipping=["l2_clip_", 0.5])
    run(optimizer, params, steps)
    assert distance(params, map(torch.tensor, wanted)) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_of_the_users_own(backend):
    params, steps = parameters(), list(gradients(3))
    start = [p.detach().double() for p in params]
    optimizer = Cubed(params, compile=backend, update_clipping=lambda u: u.clamp(min=-0.3, max=0.2))
    run(optimizer, params, steps)
    moved = [sum((g.double() ** 3).clamp(-0.3, 0.2) for g in column) for column in zip(*steps, strict=True)]
    assert distance(params, [p - 0.1 * m for p, m in zip(start, moved, strict=True)]) <= 1e-6
    assert optimizer.report.backend == backend


def evaluate(function, x, backend):
    """``function`` of a tensor, computed by a backend: what a step of lr 1 takes away from zero."""
    p = nn.Parameter(torch.zeros_like(x))
    optimizer = Plain([p], lr=1.0, compile=backend, clip=function)
    run(optimizer, [p], [[x]])
    assert optimizer.report.backend == backend
    return -p.detach()


class Plain(Optimizer):
    def __init__(self, params, lr=1.0, clip=None, **options):
        super().__init__(params, {"lr": lr, "clip": clip}, options)

    @staticmethod
    def chain(h):
        return (clipping.CustomClip(h.clip),)


@pytest.mark.parametrize("function", [torch.log1p, torch.tanh])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_generated_functions_are_torchs_over_the_whole_range(function, dtype):
    """Relative to each value, not to the largest: a tiny update must not drown in the rounding of 1 + x.

    NumPy computes in Triton's interpreter, and its vectorised logarithm and exponential are within 4 units in the last place;
    torch's functions are within one, and the formulas around them round four times, half a unit each.
    """
    sizes = torch.logspace(-30, 30, 3001, dtype=torch.float64)
    special = torch.tensor([0.0, -0.0, 0.5, -0.5, 1 - 2.0**-20, float("inf"), float("-inf"), float("nan"), -1.0, -2.0])
    x = torch.cat([sizes, -sizes, torch.linspace(-0.999, 2, 3001, dtype=torch.float64), special.double()]).to(dtype)
    ours, theirs = evaluate(function, x, "triton"), function(x)
    number = torch.isfinite(theirs)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[theirs.isinf()], theirs[theirs.isinf()])
    error = ((ours - theirs).abs() / theirs.abs().clamp(min=1e-300 if dtype == torch.float64 else 1e-38))[number]
    assert float(error.max()) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", clipping.CLIPS)
def test_nan_is_not_hidden(name, backend):
    p = nn.Parameter(torch.zeros(3))
    run(Cubed([p], compile=backend, gradient_clipping=name), [p], [[torch.tensor([1.0, float("nan"), 2.0])]])
    assert p.detach()[1].isnan()


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("l2_clip", OptionError, r"gradient_clipping='l2_clip' is not a clip; pass one of l2_clip_, .*softsign_compress"),
        (3, OptionError, "gradient_clipping=3 is not a clip"),
        (("l2_clip_", 1.0, 2.0), OptionError, "is not a clip"),
        (clipping.L2Clip, OptionError, "is not a clip"),
        (("trust_region_clip_", {"scle": 1.0}), OptionError, "no parameter 'scle'; it has bound, scale, lerp"),
        (("l2_clip_", 0.0), HyperparameterError, r"l2_clip_: threshold=0\.0 is outside \(0, inf\)"),
        (("l2_clip_", "1"), HyperparameterError, "threshold='1' is a str"),
        (("trust_region_clip_", {"lerp": 1.5}), HyperparameterError, r"lerp=1\.5 is outside \(0, 1\]"),
        (("a_law_compress", 0.05), HyperparameterError, "a=0.05 is outside"),
    ],
)
def test_errors_say_what_to_pass(value, error, words):
    with pytest.raises(error, match=words):
        clipping.resolve(value, "clip_gradient")


def test_values_that_resolve():
    assert clipping.resolve(None, "clip_update") is None
    clip = clipping.resolve(("trust_region_clip_", {"scale": 3.0}), "clip_update")
    assert clip == clipping.TrustRegionClip(scale=3.0) and clip.stage == "clip_update"
    moved = clipping.resolve(clip, "clip_gradient")
    assert (moved.stage, moved.scale, moved.name) == ("clip_gradient", 3.0, "clip_gradient_trust_region_clip")
    assert clipping.resolve(("l2_clip_", 2), "clip_update").threshold == 2  # an int is a number


def test_copies_keep_their_place():
    clip = clipping.resolve("l2_clip_", "clip_gradient")
    for twin in (copy.deepcopy(clip), pickle.loads(pickle.dumps(clip))):
        assert twin == clip and (twin.stage, twin.name) == ("clip_gradient", "clip_gradient_l2_clip")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_of_zeros_may_still_move_under_the_adaptive_clip(backend):
    p = nn.Parameter(torch.zeros(2))
    run(Cubed([p], lr=1.0, compile=backend, update_clipping=("adaptive_gradient_clipping_", 0.5)), [p], [[torch.ones(2)]])
    assert distance([p], [torch.full((2,), -0.5e-3 / 2**0.5)]) <= 1e-6
