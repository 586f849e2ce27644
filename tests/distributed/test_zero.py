"""torch's ZeroRedundancyOptimizer around any optimizer follows the optimizer alone, and saves and loads what it holds."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from core.kit import distance, one_of_each
from distributed.ranks import on_ranks
from torch import nn

import hbcore

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

SHAPES = ((7,), (6, 4), (5,), (4, 6), (3, 5), (1,))

WHOLE_MODEL = {"MSAMLaProp", "PSGDLRA"}
"""Their rules see all parameters together, and each rank's optimizer has some of them."""

OWN_COUNT = {"SFSOAP"}
"""Their averages count the steps in which a group moved anything, and a rank's group may be of matrices alone."""

DRAWN = {"LATHER"}
"""Its bases begin with eigenvectors of nearly equal eigenvalues, which what is drawn by a parameter's place decides."""

NAMES = [n for n in hbcore.list_optimizers() if not {"closure", "sparse"} & set(hbcore.info(n).spec.capabilities)]
NAMES = sorted({*NAMES} - WHOLE_MODEL - OWN_COUNT - DRAWN)

CASES = {
    **{name: (name, {}) for name in NAMES},
    "MuonAdamW-mars": ("MuonAdamW", {"mars": True, "momentum": 0.5}),
    "MuonAdamW-two-rates": ("MuonAdamW", {"groups": True}),
}


def parameters():
    return [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(SHAPES)]


def given(params, groups):
    """The parameters, or two groups of them, whose rates differ."""
    if not groups:
        return params
    rest = [p for p in params if p.ndim < 2]
    return [{"params": [p for p in params if p.ndim == 2]}, {"params": rest, "use_muon": False, "lr": 0.003}]


def train(optimizer, params, steps):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9 ** (steps.start + t))
    for step in steps:
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()
        scheduler.step()


def zero(name, params, groups=False, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"lr": 0.02, "compile": "eager", **options}
    return ZeroRedundancyOptimizer(given(params, groups), optimizer_class=hbcore.get(name), **options)


def held(params):
    return [p.detach().clone() for p in params]


def follow(rank, name, options):
    """Six steps straight; and three, a state dict that goes through a file, and three with new objects."""
    warnings.simplefilter("ignore")
    straight, first = parameters(), parameters()
    train(zero(name, straight, **options), straight, range(6))
    optimizer = zero(name, first, **options)
    train(optimizer, first, range(3))
    saved = None
    for to in range(2):
        optimizer.consolidate_state_dict(to)
        if rank == to:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second = [nn.Parameter(p) for p in held(first)]
    resumed = zero(name, second, **options)
    resumed.load_state_dict(copy.deepcopy(saved))
    rates = [group["lr"] for group in resumed.param_groups]
    train(resumed, second, range(3, 6))
    return held(straight), held(second), rates, saved, held(first)


@pytest.mark.filterwarnings("ignore:MuonAdamW. the parameters have no names")
@pytest.mark.parametrize("case", one_of_each(CASES))
def test_two_ranks_follow_the_optimizer_alone(case):
    name, options = CASES[case]
    alone = parameters()
    settings = {"lr": 0.02, "compile": "eager", **{k: v for k, v in options.items() if k != "groups"}}

    def build(params):
        return hbcore.get(name)(given(params, "groups" in options), **settings)

    train(build(alone), alone, range(6))
    for straight, resumed, rates, saved, middle in on_ranks(2, follow, name, options):
        assert distance(straight, alone) < 1e-5
        assert distance(resumed, alone) < 1e-5
        assert rates == pytest.approx([0.02 * 0.9**3, 0.003 * 0.9**3][: len(rates)])
        params = [nn.Parameter(p) for p in middle]
        optimizer = build(params)
        optimizer.load_state_dict(saved)
        train(optimizer, params, range(3, 6))
        assert distance(params, alone) < 1e-5
