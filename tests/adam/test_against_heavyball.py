"""hb_adam trains as HeavyBall 3.2.1 does, compiling off, where HeavyBall does what its papers say.

What is not compared, because HeavyBall is wrong there and our oracles decide (docs/differences.md):

==================================  ====================================================================================
not compared                        why
==================================  ====================================================================================
ADOPT                               it debiases both moments; its first move is ten times the paper's
NAdam with coupled weight decay     its decay cancels
``mars``                            gamma and beta are swapped in the call
``palm``                            beta2 is debiased again
``use_ema``, ``division_backend``   the average is inverted; the backend is ignored
``eps`` of LaProp, SignLaProp,      it is ignored
UnscaledAdamW, SUDSAdamW
SFAdamW with a falling rate         it weighs by the present rate, the authors' library by the largest so far
SFAdamW's caution and decay         its caution takes the decay for a part of the update; ours comes before it
SUDSAdamW with a warm-up            the gradient that only primes counts in its warm-up; here it is no step
MSAMLaProp of several tensors       each has a perturbation of its own length; in the paper the model has one
global clips of several groups      they act in each group by itself
``adaptive_gradient_clipping_``     as an option it raises a TypeError
SAMWrapper                          its step is not normalised
state, and storage in bfloat16      debiased moments are stored there, plain ones here
Adam, Lion, Adafactor, SparseAdam,  it has none of them
Adams
==================================  ====================================================================================

``caution`` and ``cautious_weight_decay`` compare sign bits in HeavyBall, so that a zero agrees with whatever is positive; in
the papers it agrees with nothing. The gradients here have no zeros; and the two options are not tried together, as HeavyBall's
decay looks at the update before caution, ours at what caution leaves of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from core.kit import SHAPES, distance, parameters, run
from torch import Tensor

import hb_adam

STEPS = 20
TOLERANCE = 1e-5

DECAY = {"weight_decay": 0.125}
AROUND = ({}, {**DECAY, "warmup_steps": 4, "cautious_weight_decay": True}, {**DECAY, "warmup_steps": 4, "caution": True})
BETAS = {"betas": (0.7, 0.9)}

CASES = {
    "SGD": ({}, {"beta": 0.5}),
    "AdamW": ({}, {**BETAS, "eps": 0.05, "promote": True}),
    "UnscaledAdamW": ({}, BETAS),
    "NAdam": (
        {},
        {**BETAS, "momentum_decay": 0.3, "eps": 0.05, "warmup_steps": 4, "caution": True},
        {**AROUND[1], "decoupled_weight_decay": True},
    ),
    "RMSprop": ({}, {**BETAS, "eps": 0.05}),
    "AdEMAMix": ({}, {"betas": (0.7, 0.9, 0.95), "alpha": 5.0, "beta3_warmup": 17, "alpha_warmup": 9, "eps": 0.05}),
    "AdamC": ({"max_lr": 0.0025}, {**BETAS, "max_lr": 0.01, "weight_decay": 2.0, "eps": 0.05}),
    "LaProp": ({}, BETAS),
    "SignLaProp": ({}, BETAS),
    "MSAMLaProp": ({}, {**BETAS, "sam_step_size": 0.3, "eps": 0.05}),
    "SUDSAdamW": ({}, {**DECAY, "caution": True}, {**BETAS, "precond_lr": 0.1, **DECAY, "cautious_weight_decay": True}),
    "SFAdamW": (
        {"caution": True, "warmup_steps": 4},
        {**BETAS, "r": 0.5, "weight_lr_power": 1.0, "eps": 0.05},
        {**AROUND[1], "r": 0.5},
    ),
}
"""Name -> the settings in which it is compared, each with those of :data:`AROUND` but where not all of them are comparable."""

ALL = [
    (name, {**settings, **around})
    for name, several in CASES.items()
    for settings in several
    for around in (AROUND if name not in ("NAdam", "SUDSAdamW", "SFAdamW") else AROUND[:1])
]

CLIPS = (
    "l2_clip_", "rmsnorm_clip_", "global_l2norm_clip", "global_rmsnorm_clip", "trust_region_clip_", "a_law_compress",
    "mu_law_compress", "softsign_compress",
)  # fmt: skip


@pytest.fixture
def heavyball():
    """The package, with its compiling off; on again afterwards."""
    package = pytest.importorskip("heavyball", reason="heavyball does not import here", exc_type=ImportError)
    utils = package.utils
    before, utils.compile_mode = utils.compile_mode, None
    yield package
    utils.compile_mode = before


def gradients_without_zeros(shapes) -> Iterator[list[Tensor]]:
    """Random gradients whose size varies between steps."""
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        yield [torch.randn(s, generator=generator) * 2.0 ** (step % 5 - 2) for s in shapes]


def trained_apart(package, name, settings, rates=None):
    """How far from HeavyBall's our parameters are after twenty steps, and the pairs of parameters and of optimizers."""
    shapes = SHAPES if name != "MSAMLaProp" else SHAPES[:1]
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer = getattr(hb_adam, name)(ours, **settings, compile="eager")
    reference = getattr(package, name)(theirs, **settings)
    start = parameters(shapes)
    worst = 0.0
    for step, grads in enumerate(gradients_without_zeros(shapes)):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rates[step]
        run(optimizer, ours, [grads])
        run(reference, theirs, [grads])
        worst = max(worst, distance(ours, theirs))
    assert distance(theirs, start) > 100 * TOLERANCE, "nothing moved: the comparison would be empty"
    return worst, (ours, theirs), (optimizer, reference)


@pytest.mark.parametrize(("name", "settings"), ALL, ids=[f"{n}-{', '.join(s) or 'defaults'}" for n, s in ALL])
def test_heavyball_trains_alike(heavyball, name, settings):
    worst, _, _ = trained_apart(heavyball, name, settings)
    assert worst < TOLERANCE


@pytest.mark.parametrize("option", ["gradient_clipping", "update_clipping"])
@pytest.mark.parametrize("clip", CLIPS)
def test_heavyball_clips_alike(heavyball, clip, option):
    for name in ("SGD", "AdamW"):
        worst, _, _ = trained_apart(heavyball, name, {option: clip})
        assert worst < TOLERANCE, name


@pytest.mark.filterwarnings("ignore:Learning rate changed between steps:UserWarning")
def test_heavyball_decays_alike_when_the_rate_falls(heavyball):
    rates = [0.01 * (1 + math.cos(math.pi * t / STEPS)) / 2 for t in range(STEPS)]
    for name, settings in (("AdamW", DECAY), ("AdamC", {"weight_decay": 2.0, "max_lr": 0.01}), ("SignLaProp", DECAY)):
        worst, _, _ = trained_apart(heavyball, name, settings, rates)
        assert worst < TOLERANCE, name


def test_heavyball_evaluates_alike_without_a_schedule(heavyball):
    _, (ours, theirs), (optimizer, reference) = trained_apart(heavyball, "SFAdamW", {"warmup_steps": 4, **DECAY})
    training = [p.detach().clone() for p in theirs]
    optimizer.eval()
    reference.eval()
    assert distance(ours, theirs) < TOLERANCE < distance(theirs, training)


def test_every_optimizer_is_compared_or_excused(heavyball):
    both = {name for name in hb_adam.__all__ if hasattr(heavyball, name) and name[0].isupper()}
    excused = {"ADOPT", "SAMWrapper"}
    assert both - excused == set(CASES) and excused <= both
