"""Scion: its steps are the furthest points of their balls, weights stay where they are until the first one, and its start."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from core.kit import distance, gradients, parameters, run, same, values
from torch import nn

from hb_muon import Scion, init_scion_
from hb_muon.rules import MuonMomentum, Orthogonalize
from hb_muon.scion import BiasLMO, WeightLMO
from hbcore.api import Context
from hbcore.rules.division import eps_clamp

WEIGHTS = {
    "linear": (6, 4), "wide": (3, 8), "row": (1, 9), "column": (9, 1), "conv1d": (6, 4, 3), "conv2d": (6, 4, 3, 2),
    "conv3d": (5, 3, 2, 2, 3), "pointwise": (6, 4, 1, 1),
}  # fmt: skip
every_weight = pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS)


def context(u):
    numel = torch.tensor(float(u.numel()))
    return Context(u, u, torch.ones(()), eps_clamp, torch.sum, torch.amax, numel)


def lmo(u, **settings):
    """The rule's answer for one weight, with the exact orthogonal factor."""
    rule = WeightLMO(factor=Orthogonalize(method="exact", scale_mode="none"), **settings)
    return rule.update(u[None], {}, context(u))[0][0]


def first_step(shape, **options):
    """What the first step takes from a parameter whose gradient is its own value, and that value."""
    [p] = parameters([shape], torch.float64)
    start = p.detach().clone()
    run(Scion([p], lr=1.0, compile="eager", **options), [p], [[start]])
    return start - p.detach(), start


@every_weight
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_spectral_step_has_all_singular_values_on_the_boundary(shape, scale):
    step, start = first_step(shape, method="exact", scale=scale)
    outputs, inputs, places = shape[0], shape[1], math.prod(shape[2:])
    sigma = torch.linalg.svdvals(step.reshape(outputs, -1))
    torch.testing.assert_close(sigma, torch.full_like(sigma, scale * math.sqrt(outputs / inputs) / places))
    assert (step * start).sum() > 0


@pytest.mark.parametrize("norm", ["spectral", "sign"])
def test_no_point_of_the_ball_lies_further_along_the_gradient(norm):
    """Vertices of the ball do not: random orthogonal matrices, random signs."""
    u = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = (lmo(u, norm=norm) * u).sum()
    for seed in range(50):
        drawn = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        other = lmo(drawn, norm=norm)
        assert torch.allclose(other.norm(), lmo(u, norm=norm).norm())
        assert (other * u).sum() < best


@every_weight
def test_a_sign_step_moves_every_element_alike(shape):
    step, start = first_step(shape, norm="sign", scale=2.0)
    torch.testing.assert_close(step, start.sign() * (2.0 / math.prod(shape[1:])))


@pytest.mark.parametrize("shape", [(13,), (1,), ()], ids=str)
@pytest.mark.parametrize("norm", ["spectral", "sign"])
def test_a_biass_step_has_the_root_mean_square_of_the_radius(norm, shape):
    step, start = first_step(shape, scale=2.0, norm=norm)
    torch.testing.assert_close(step, 2.0 * start / start.square().mean().sqrt())


def test_the_size_of_a_gradient_does_not_matter():
    shapes = [*WEIGHTS.values(), (7,), ()]
    ends = []
    for size in (1.0, 2.0**-12):
        params = parameters(shapes, torch.float64)
        grads = [[size * g for g in step] for step in gradients(5, shapes, torch.float64)]
        run(Scion(params, lr=0.1, compile="eager"), params, grads)
        ends.append(params)
    assert distance(*ends) < 1e-9


def test_a_constrained_weight_stays_in_its_ball():
    shapes = [(6, 4), (6, 4, 3, 3)]
    params = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    optimizer = Scion(params, lr=0.3, scale=0.5, weight_decay=1.0, method="exact", compile="eager")
    for grads in gradients(20, shapes, torch.float64):
        run(optimizer, params, [grads])
        for p, radius in zip(params, (0.5 * math.sqrt(1.5), 0.5 * math.sqrt(1.5) / 9), strict=True):
            assert torch.linalg.matrix_norm(p.detach().flatten(1), 2) < radius * (1 + 1e-9)


def test_neither_construction_nor_a_step_of_length_zero_touches_the_weights():
    params = parameters([*WEIGHTS.values(), (7,), ()])
    before = values(params)
    optimizer = Scion(params, lr=0.0, compile="eager")
    assert same(params, before)
    run(optimizer, params, gradients(2, [p.shape for p in params]))
    assert same(params, before)


def test_the_scale_can_be_scheduled_and_set_for_a_group():
    p, q = parameters([(6, 4), (6, 4)], torch.float64)
    q.data.copy_(p.data)
    optimizer = Scion([{"params": [p]}, {"params": [q], "scale": 3.0}], lr=0.1, compile="eager")
    start = p.detach().clone()
    grad = torch.ones_like(p) + start
    run(optimizer, [p, q], [[grad, grad]])
    torch.testing.assert_close(start - q.detach(), 3 * (start - p.detach()))
    programs = optimizer.report.programs
    before = values([p])[0]
    optimizer.param_groups[0]["scale"] = 5.0
    step = start - before
    run(optimizer, [p, q], [[grad, grad]])
    torch.testing.assert_close(before - p.detach(), 5 * step)
    assert optimizer.report.programs == programs


@pytest.mark.parametrize(
    "spelling", [{"beta": 0.6}, {"betas": (0.6, 0.99)}, {"momentum": 0.6}, {"betas": [0.1], "beta": 0.6}], ids=str
)
def test_momentum_has_three_names(spelling):
    assert Scion(parameters([(3, 4)]), **spelling).param_groups[0]["momentum"] == 0.6


def test_names_defaults_and_what_is_remembered():
    optimizer = Scion(parameters([(3, 4), (3,)]))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["scale"], group["eps"]) == (0.0025, 0.9, 1.0, 1e-8)
    momentum, fork = Scion.chain(type("h", (), group))
    assert isinstance(momentum, MuonMomentum) and not momentum.nesterov
    assert [type(t) for t in (*fork.then, *fork.otherwise)] == [WeightLMO, BiasLMO]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "frobenius"}, "norm='frobenius' does not exist; pass one of 'spectral', 'sign'"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"momentum": 1.0}, "momentum=1.0 is outside"),
    ],
    ids=str,
)
def test_settings_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        Scion(parameters([(3, 4)]), **options)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 8, 3), nn.Conv3d(2, 4, (1, 2, 3), dtype=torch.bfloat16)
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 5, dtype=torch.float64)


def test_the_start_lies_on_the_boundary():
    model = init_scion_(Model(), 3.0, torch.Generator().manual_seed(0))
    for p, places, tolerance in ((model.linear.weight, 1, 1e-12), (model.conv.weight, 9, 1e-6), (model.deep.weight, 6, 1e-2)):
        for weight in p.detach().double().flatten(2).unbind(2) if p.ndim > 2 else [p.detach()]:
            sigma = torch.linalg.svdvals(weight)
            wanted = torch.full_like(sigma, 3.0 * math.sqrt(p.shape[0] / p.shape[1]) / places)
            torch.testing.assert_close(sigma, wanted, rtol=tolerance, atol=0)
    first, second = model.conv.weight[:, :, 0, 0], model.conv.weight[:, :, 0, 1]
    assert not torch.equal(first, second)
    for layer in (model.conv, model.deep, model.linear, model.norm):
        assert not layer.bias.any()
    assert torch.equal(model.norm.weight, torch.ones(8))
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_a_seed_decides_the_start():
    model = Model()
    one, two = (init_scion_(copy.deepcopy(model), generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert same(one.parameters(), two.parameters())
    assert not same(one.parameters(), init_scion_(model, generator=torch.Generator().manual_seed(2)).parameters())
