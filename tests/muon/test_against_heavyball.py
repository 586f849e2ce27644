"""hb_muon trains as HeavyBall 3.2.1 does, compiling off, where HeavyBall does what its papers say.

What is not compared, because HeavyBall is wrong there and our oracles decide (docs/differences.md):

===================================  ===================================================================================
not compared                         why
===================================  ===================================================================================
Muon's and MuonAdamW's Nesterov      it is g + b; ``heavyball_momentum=True`` has the same form in both, and is compared
Muon's parameters of one dimension   they take the momentum there, Adam's step here
HyperBallAdamW's first moment        it has none: compared with betas[0]=0
Scion's first step                   it draws the weights anew; its drawing is off here
Scion's conv3d                       it counts as a bias
``eps`` of the LaProp rules          it is ignored
``method``                           matrices that are not square get Newton-Schulz whatever is asked for
HyperBallAdamW's caution and decay   its caution takes the decay for a part of the update; each is compared by itself
caution and cautious decay           see tests/adam/test_against_heavyball.py
===================================  ===================================================================================

HeavyBall iterates in bfloat16, rounded stochastically: here both iterate in float32, and the rounding is off.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from core.kit import distance, parameters, run
from torch import Tensor

import hb_muon

STEPS = 20
TOLERANCE = 1e-5
MATRICES = ((6, 6), (5, 9), (9, 5), (6, 3, 2, 2))
EVERYTHING = (*MATRICES, (13,))
DECAY = {"weight_decay": 0.125, "warmup_steps": 4}
AROUND = ({}, {**DECAY, "cautious_weight_decay": True}, {**DECAY, "caution": True})
BETAS = {"betas": (0.7, 0.9)}

CASES = {
    "Muon": (
        MATRICES,
        {"nesterov": False},
        {"nesterov": False, **BETAS},
        {"heavyball_momentum": True},
        {"heavyball_momentum": True, "nesterov": False},
    ),
    "MuonAdamW": (EVERYTHING, {"nesterov": False}, {"nesterov": False, **BETAS}),
    "MuonLaProp": (EVERYTHING, {}, BETAS),
    "OrthoLaProp": (EVERYTHING, {}, BETAS),
    "LaPropOrtho": (EVERYTHING, {}, BETAS),
    "HyperBallAdamW": (EVERYTHING, {"betas": (0.0, 0.99), "lr": 0.02}, {"betas": (0.0, 0.9), "lr": 0.02}),
    "Scion": (EVERYTHING, {}, {"scale": 3.0, **BETAS}),
}
"""Name -> the shapes, and the settings in which it is compared, each with those of :data:`AROUND`."""

ALL = [
    (name, shapes, {**settings, **around})
    for name, (shapes, *several) in CASES.items()
    for settings in several
    for around in AROUND
    if not (name == "HyperBallAdamW" and "caution" in around)
]
ALL.append(("HyperBallAdamW", EVERYTHING, {**CASES["HyperBallAdamW"][1], "caution": True, "warmup_steps": 4}))


@pytest.fixture
def heavyball(monkeypatch):
    """The package, without compiling, stochastic rounding and Scion's drawing of weights."""
    package = pytest.importorskip("heavyball", reason="heavyball does not import here", exc_type=ImportError)
    utils = package.utils
    monkeypatch.setattr(utils, "compile_mode", None)
    monkeypatch.setattr(utils, "stochastic_round_", lambda ref, source=None: ref if source is None else source.to(ref.dtype))
    monkeypatch.setattr(utils, "scion_auto_init_param_", lambda param, scale, seed=0: None)
    return package


def gradients_without_zeros(shapes) -> Iterator[list[Tensor]]:
    """Random gradients whose size varies between steps."""
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        yield [torch.randn(s, generator=generator) * 2.0 ** (step % 5 - 2) for s in shapes]


@pytest.mark.parametrize(("name", "shapes", "settings"), ALL, ids=[f"{n}-{', '.join(s) or 'defaults'}" for n, _, s in ALL])
def test_heavyball_trains_alike(heavyball, name, shapes, settings):
    cls = getattr(hb_muon, name)
    in_float32 = {"method": "newton_schulz", "ns_dtype": "float32"} if "method" in cls.own else {}
    start, ours, theirs = parameters(shapes), parameters(shapes), parameters(shapes)
    optimizer = cls(ours, **settings, **in_float32, compile="eager")
    reference = getattr(heavyball, name)(theirs, **settings)
    for grads in gradients_without_zeros(shapes):
        run(optimizer, ours, [grads])
        run(reference, theirs, [grads])
        assert distance(ours, theirs) < TOLERANCE
    assert distance(theirs, start) > 100 * TOLERANCE, "nothing moved: the comparison would be empty"


def test_every_optimizer_is_compared(heavyball):
    assert {name for name in hb_muon.__all__ if hasattr(heavyball, name) and name[0].isupper()} == set(CASES)
