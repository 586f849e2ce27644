"""Schedule-free AdamW against its float64 oracle and against the authors' library."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from core.kit import SHAPES, combined, distance, gradients, parameters, run, same, values
from reference import clipping
from reference.schedule_free import schedule_free_adamw
from rounding import drift
from torch import nn

import hbcore
from hb_adam import SFAdamW
from hb_adam.schedule_free import ScheduleFree
from hbcore.errors import HyperparameterError, OptionError

STEPS = 25
TOLERANCE = {torch.float64: 1e-12, torch.float32: drift(torch.float32, STEPS)}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# (ours, the oracle's where the spelling differs)
CASES = {
    "plain": ({}, {}),
    "betas": ({"betas": (0.6, 0.999)}, {}),
    "eps": ({"eps": 0.5}, {}),
    "r": ({"r": 1.5}, {}),
    "weight_lr_power": ({"weight_lr_power": 0.5, "warmup_steps": 9}, {}),
    "equal-weights": ({"weight_lr_power": 0.0, "warmup_steps": 9}, {}),
    "warmup": ({"warmup_steps": 7}, {}),
    "weight_decay": ({"weight_decay": 0.3}, {}),
    "cautious_weight_decay": ({"weight_decay": 0.3, "cautious_weight_decay": True}, {}),
    "caution": ({"caution": True, "maximize": True}, {}),
    "clip": ({"update_clipping": ("l2_clip_", 0.7)}, {"clip_update": lambda u: clipping.l2([u], [], 0.7)[0]}),
    "eps_add": ({"division_backend": "eps_add", "eps": 0.5}, {"division": "eps_add"}),
    "together": (
        {"caution": True, "weight_decay": 0.3, "warmup_steps": 4, "r": 0.5, "update_clipping": "l2_clip_"},
        {"clip_update": lambda u: clipping.l2([u], [])[0]},
    ),
}
SPELLED_OTHERWISE = {"division_backend", "update_clipping", "compile"}


def weights(optimizer):
    """The parameters as they are, and those to evaluate with."""
    x = []
    for group in optimizer.param_groups:
        rule = ScheduleFree(beta1=group["betas"][0])
        for p in group["params"]:
            swapped, changed = rule.swap(p.detach(), optimizer.state[p], False)
            assert not changed
            x.append(swapped)
    return [p for group in optimizer.param_groups for p in group["params"]], x


def expected(shapes, dtype, steps=STEPS, **settings):
    """The oracle's ``y`` and ``x`` for the same start and the same gradients."""
    columns = zip(*gradients(steps, shapes, dtype), strict=True)
    found = [
        schedule_free_adamw(p.detach().double().numpy(), [g.double().numpy() for g in column], **settings)
        for p, column in zip(parameters(shapes, dtype), columns, strict=True)
    ]
    return [torch.tensor(w.y) for w in found], [torch.tensor(w.x) for w in found]


def agree(optimizer, wanted, tolerance):
    return all(distance(ours, theirs) < tolerance for ours, theirs in zip(weights(optimizer), wanted, strict=True))


@every_dtype
@pytest.mark.parametrize("case", CASES)
def test_an_option_agrees_with_the_oracle(case, dtype):
    options, spelled = CASES[case]
    params = parameters(dtype=dtype)
    optimizer = SFAdamW(params, lr=0.02, **options, compile="eager")
    run(optimizer, params, gradients(STEPS, dtype=dtype))
    settings = {k: v for k, v in options.items() if k not in SPELLED_OTHERWISE} | spelled
    assert agree(optimizer, expected(SHAPES, dtype, lr=0.02, **settings), TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # Triton's interpreter divides with NumPy
@pytest.mark.parametrize(
    ("backend", "phases", "dtype"),
    combined(
        ["inductor", "triton"], ["one-phase", "two-phases"], TOLERANCE, compiled=[("inductor", "two-phases", torch.float32)]
    ),
    ids=str,
)
def test_compiled_backends_agree_with_the_oracle(backend, phases, dtype):
    if backend == "triton":
        helpers = pytest.importorskip("hbcore.engine.backends.triton.device_lib")
        if not helpers.INTERPRETED:
            pytest.skip("runs under Triton's interpreter")
    shapes = (*SHAPES, (40, 70))
    params = parameters(shapes, dtype)
    options = {"weight_decay": 0.1, "warmup_steps": 3, "caution": phases == "two-phases"}
    optimizer = SFAdamW(params, lr=0.02, **options, compile=backend)
    run(optimizer, params, gradients(8, shapes, dtype))
    assert optimizer.report.backend == backend and not optimizer.report.reasons
    assert agree(optimizer, expected(shapes, dtype, 8, lr=0.02, **options), TOLERANCE[dtype])


def test_a_clipped_gradient_is_what_the_rule_sees():
    params, clipped = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    ours = SFAdamW(params, gradient_clipping=("l2_clip_", 0.4), compile="eager")
    run(ours, params, gradients(STEPS, dtype=torch.float64))
    reference = SFAdamW(clipped, compile="eager")
    smaller = ([torch.tensor(clipping.l2([g.numpy()], [], 0.4)[0]) for g in gs] for gs in gradients(STEPS, dtype=torch.float64))
    run(reference, clipped, smaller)
    assert distance(params, clipped) < 1e-12


SCHEDULES = {
    "falling": [0.1 * 0.8**t for t in range(STEPS)],
    "rising": [0.001 * 1.2**t for t in range(STEPS)],
    "there-and-back": [0.05 * math.sin(math.pi * (t + 1) / 26) for t in range(STEPS)],
    "from-zero": [0.0, 0.0, *[0.02] * (STEPS - 3), 0.0],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"warmup_steps": 5, "r": 1.0}, {"weight_lr_power": 1.0}], ids=str)
def test_weights_follow_the_largest_learning_rate_so_far(schedule, options):
    params = parameters(dtype=torch.float64)
    optimizer = SFAdamW(params, **options, compile="eager")
    [group] = optimizer.param_groups
    for lr, grads in zip(SCHEDULES[schedule], gradients(STEPS, dtype=torch.float64), strict=True):
        group["lr"] = lr
        run(optimizer, params, [grads])
    assert agree(optimizer, expected(SHAPES, torch.float64, lr=SCHEDULES[schedule], **options), 1e-12)
    assert optimizer.report.programs == 1


def test_groups_carry_their_own_weights_and_a_late_parameter_those_of_its_group():
    """Two groups, one of them for double as long as the other, and two parameters that join theirs late."""
    settings = [{"lr": 0.03, "warmup_steps": 4}, {"lr": 0.002, "betas": (0.7, 0.95), "weight_decay": 0.2}]
    columns = [list(column) for column in zip(*gradients(20, [(4, 3)] * 4, torch.float64), strict=True)]
    for column, first in zip(columns, (0, 6, 10, 15), strict=True):
        column[:first] = [None] * first
    params = parameters([(4, 3)] * 4, torch.float64)
    starts = values(params)
    optimizer = SFAdamW([{"params": params[:2], **settings[0]}, {"params": params[2:], **settings[1]}], compile="eager")
    for grads in zip(*columns, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
    begun = (0, 0, 10, 10)  # a group takes no step while none of its parameters has a gradient
    wanted = [
        schedule_free_adamw(start.numpy(), [None if g is None else g.numpy() for g in column[k:]], **settings[i // 2])
        for i, (start, column, k) in enumerate(zip(starts, columns, begun, strict=True))
    ]
    both = [torch.tensor(w.y) for w in wanted], [torch.tensor(w.x) for w in wanted]
    assert agree(optimizer, both, 1e-12)


PARITY = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "betas": (0.95, 0.999)},
    "warmup": {"warmup_steps": 10, "weight_decay": 0.1},
    "weights": {"r": 1.0, "weight_lr_power": 1.0},
    "lr-falls": {"lr": 0.01},
    "lr-falls-in-warmup": {"lr": 0.01, "warmup_steps": 60},
}


@every_dtype
@pytest.mark.parametrize("case", PARITY)
def test_the_authors_library_trains_alike(case, dtype):
    """Their ``(k + 1) / N`` counts from 0, so that one step less is warm-up; their divisor is ``sqrt(v) + eps``."""
    library = pytest.importorskip("schedulefree")
    options = {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-6, **PARITY[case]}
    params, theirs = parameters(dtype=dtype), parameters(dtype=dtype)
    ours = SFAdamW(params, **options, division_backend="eps_add", compile="eager")
    reference = library.AdamWScheduleFree(theirs, **options | {"warmup_steps": options.get("warmup_steps", 0) + 1})
    reference.train()
    for grads in gradients(100, dtype=dtype):
        run(ours, params, [grads])
        run(reference, theirs, [grads])
        if case.startswith("lr-falls"):
            for optimizer in (ours, reference):
                optimizer.param_groups[0]["lr"] *= 0.98
    y = values(theirs)
    reference.eval()
    assert agree(ours, (y, theirs), 1e-12 if dtype == torch.float64 else drift(dtype, 100))


def test_a_resumed_training_goes_on_as_if_nothing_had_happened():
    options = {"lr": 0.02, "warmup_steps": 12, "r": 1.0, "compile": "eager"}
    params = parameters()
    optimizer = SFAdamW(params, **options)
    steps = list(gradients(16))
    run(optimizer, params, steps[:6])
    copies = [nn.Parameter(p) for p in values(params)]
    resumed = SFAdamW(copies, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, ps in ((optimizer, params), (resumed, copies)):
        run(o, ps, steps[6:])
    assert same(params, copies)
    assert same(weights(optimizer)[1], weights(resumed)[1])


@every_dtype
def test_swapping_twice_gives_the_parameter_back(dtype):
    params = parameters(dtype=dtype)
    optimizer = SFAdamW(params, lr=0.5, betas=(0.5, 0.9), compile="eager")
    run(optimizer, params, gradients(5, dtype=dtype))
    rule = ScheduleFree(beta1=0.5)
    for p, x in zip(*weights(optimizer), strict=True):
        back, changed = rule.swap(x, optimizer.state[p], True)
        assert not changed
        assert distance([x], [p]) > 0.05
        assert ((back - p).abs() <= torch.finfo(dtype).eps * (p.abs() + x.abs())).all()


def test_a_parameter_that_never_stepped_is_its_own_average():
    p = torch.randn(5)
    swapped, _ = ScheduleFree().swap(p, {"z_minus_y": torch.zeros(5)}, False)
    assert torch.equal(swapped, p)


def test_the_first_step_is_adam_without_momentum_whatever_the_betas():
    """All weight is on the only iterate: ``x = y = z``."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    p.grad = torch.tensor([0.5, -0.25, 0.0], dtype=torch.float64)
    optimizer = SFAdamW([p], lr=0.125, betas=(0.3, 0.7), compile="eager")
    optimizer.step()
    assert np.allclose(p.detach().numpy(), [0.875, -1.875, 3.0], rtol=1e-15)
    assert optimizer.state[p]["z_minus_y"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"betas": (0.0, 0.9)}, r"beta1=0\.0 is outside \(0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1\.0 is outside \[0, 1\)"),
        ({"weight_lr_power": -1.0}, r"weight_lr_power=-1\.0 is outside"),
        ({"r": float("nan")}, "r=nan is outside"),
    ],
)
def test_numbers_out_of_bounds_are_refused(options, said):
    with pytest.raises(HyperparameterError, match=said):
        SFAdamW([nn.Parameter(torch.ones(2))], **options)


def test_capturable_is_refused_until_groups_carry_numbers_on_the_device():
    with pytest.raises(OptionError, match="schedule_free"):
        SFAdamW([nn.Parameter(torch.ones(2))], capturable=True)


@pytest.mark.filterwarnings("ignore:ForeachSFAdamW is another name:FutureWarning")
def test_its_names_and_defaults():
    assert hbcore.get("SFAdamW") is hbcore.get("ForeachSFAdamW") is SFAdamW
    [group] = SFAdamW([nn.Parameter(torch.ones(2))]).param_groups
    wanted = {"lr": 0.0025, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0, "r": 0.0, "weight_lr_power": 2.0}
    assert {key: group[key] for key in wanted} == wanted


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}, {"param_ecc": "bf16+8"}], ids=str)
@pytest.mark.filterwarnings("ignore:.*param_ecc:hbcore.errors.StateWarning")
def test_evaluating_now_and_then_changes_nothing_and_sees_the_newest_average(options):
    shapes = ((5, 7), (3,))
    params, twins = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    ours, plain = (SFAdamW(ps, lr=0.1, compile="eager", **options) for ps in (params, twins))
    seen = []
    for step in range(6):
        for optimizer, ps in ((ours, params), (plain, twins)):
            generator = torch.Generator().manual_seed(step)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
        trained = [p.detach().clone() for p in params]
        ours.eval()
        ours.eval()
        seen.append([p.detach().clone() for p in params])
        ours.train()
        assert all(torch.equal(p, t) for p, t in zip(params, trained, strict=True))
    assert all(torch.equal(p, t) for p, t in zip(params, twins, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in itertools.pairwise(seen))
    plain.eval()
    assert all(torch.equal(p, t) for p, t in zip(twins, seen[-1], strict=True))


def test_weights_that_somebody_wrote_while_evaluating_are_taken_up():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = SFAdamW([p], lr=0.1, compile="eager")
    for _ in range(3):
        p.grad = torch.arange(4.0)
        optimizer.step()
    before = p.detach().clone()
    optimizer.eval()
    p.data.add_(1)  # which no version counter sees
    optimizer.train()
    assert torch.allclose(p, before + 1, atol=1e-6)
