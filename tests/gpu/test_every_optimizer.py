"""Every registered optimizer steps on a GPU as it does on a CPU: what only fails where a tensor lies elsewhere shows here."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
from core.kit import distance
from torch import nn

import hbcore
from hbcore import registry

pytestmark = pytest.mark.gpu

SHAPES = ((24, 24), (24, 24), (7,), ())
"""Square: where a gradient has less than full rank, rounding chooses bases."""
SPECS = {name: registry.info(name).spec for name in registry.list_optimizers() if name != "SplitOpt"}
NAMES = [name for name, spec in SPECS.items() if not spec.capabilities & {"closure", "sparse"}]


def trained(name, device, **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]
    before = [p.detach().cpu().clone() for p in params]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = hbcore.get(name)(named, lr=0.01, **options)
    for _ in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device)
        optimizer.step()
    return [p.detach().cpu() - b for p, b in zip(params, before, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_follows_the_cpu(name):
    same = {"matmul_precision": "ieee", "ns_dtype": "float32"}  # where a GPU would choose otherwise
    precision = {k: v for k, v in same.items() if k in signature(hbcore.get(name)).parameters}
    on_gpu, on_cpu = trained(name, "cuda", **precision), trained(name, "cpu", compile="eager", **precision)
    assert all(torch.isfinite(d).all() for d in on_gpu)
    assert distance(on_gpu, on_cpu) < 2e-3
