"""Matrix rules on a CUDA device: the CPU's numbers, exact resumption, flat memory, and two GPUs that follow one."""

from __future__ import annotations

import io

import pytest
import torch
from core.kit import distance
from distributed import jobs
from distributed.ranks import on_ranks
from torch import nn

from hb_adam import SFAdamW
from hb_muon import Muon
from hb_psgd import PSGDLRA, PSGDKron
from hb_soap import SOAP

pytestmark = pytest.mark.gpu

SHAPES = ((32, 32), (32, 32), (31, 32), (33, 32), (21, 5, 2, 2), (7,), (), (32, 32))
FAMILIES = {
    "muon": (Muon, {"ns_dtype": "float32"}, 2e-3),
    "muon-bf16": (Muon, {"method": "newton_schulz"}, 2e-2),  # what "auto" is on a CPU
    "soap": (SOAP, {"precondition_frequency": 2}, 1e-3),
    "psgd": (PSGDKron, {}, 1e-3),
    "psgd-lra": (PSGDLRA, {}, 1e-3),
    "schedule-free": (SFAdamW, {"weight_decay": 0.1}, 1e-5),
}


def parameters(device):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]


def run(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()


def moved(params):
    """How far each parameter went: what a tolerance is relative to."""
    return [p.detach().cpu() - q.detach() for p, q in zip(params, parameters("cpu"), strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_follows_the_cpu(family):
    cls, options, tolerance = FAMILIES[family]
    results = []
    for device in ("cuda", "cpu"):
        params = parameters(device)
        optimizer = cls(params, lr=0.01, compile="auto" if device == "cuda" else "eager", **options)
        run(optimizer, params, range(8))
        results.append(moved(params))
        if device == "cuda":
            assert (optimizer.report.backend, optimizer.report.reasons) == ("triton", [])
    assert distance(*results) < tolerance


@pytest.mark.parametrize("ecc", [None, "bf16+8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_resumes_bit_for_bit(family, ecc):
    cls, options, _ = FAMILIES[family]
    options = {**options, "ecc": ecc}
    straight, halted = parameters("cuda"), parameters("cuda")
    run(cls(straight, lr=0.01, **options), straight, range(8))
    first = cls(halted, lr=0.01, **options)
    run(first, halted, range(4))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = cls(halted, lr=0.5, **options)
    second.load_state_dict(torch.load(buffer, weights_only=True, map_location="cpu"))
    run(second, halted, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight, halted, strict=True))


@pytest.mark.parametrize("family", ["muon", "soap", "psgd", "psgd-lra"])
def test_memory_is_flat_after_the_third_step(family):
    cls, options, _ = FAMILIES[family]
    params = parameters("cuda")
    optimizer = cls(params, lr=0.01, **options)
    run(optimizer, params, range(4))
    before = torch.cuda.memory_allocated()
    run(optimizer, params, range(4, 12))
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"weight_decay": 0.1}),
        ("AdamW", {"caution": True, "gradient_clipping": "global_l2norm_clip"}),
        ("Muon", {"ns_dtype": "float32"}),
        ("SOAP", {}),
        ("PSGDKron", {}),
        ("PSGDLRA", {}),
    ],
)
def test_two_gpus_follow_one(name, options):
    alone = jobs.follow(0, name, options, "alone", "cuda")
    for result in on_ranks(2, jobs.follow, name, options, "fsdp", "cuda", backend="nccl"):
        assert distance([result[k] for k in alone], list(alone.values())) < 2e-6
