"""``report_norms=True`` on a GPU: true, without a bit of difference in the weights, and without a step that waits."""

from __future__ import annotations

import math

import pytest
import torch
from core.kit import parameters
from torch import nn

import hbcore
from hbcore.engine.param_codec import full_of

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::hbcore.errors.StateWarning")]

DEVICE = "cuda"
SHAPES = ((512, 384), (384,), (50_001,), (64, 65), (3, 5, 7), (1,), ())


def built(name, **options):
    params = [nn.Parameter(p.detach().to(DEVICE)) for p in parameters(SHAPES)]
    return params, hbcore.get(name)(list(zip("abcdefg", params, strict=True)), lr=0.01, **options)


def give(params, t):
    generator = torch.Generator(DEVICE).manual_seed(t)
    for p in params:
        g = torch.randn(p.shape, generator=generator, device=DEVICE).to(p.dtype)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def rms(t):
    return float(t.double().square().mean().sqrt())


def weights(params, optimizer):
    full = [full_of(optimizer.core, p) for p in params]
    return [(p.detach() if f is None else f).clone() for p, f in zip(params, full, strict=True)]


def agree(norms, before, after, eps):
    for (update, weight), a, b in zip(norms.values(), before, after, strict=True):
        room = float(b.double().abs().max()) * eps
        assert math.isclose(weight, rms(b), rel_tol=1e-5, abs_tol=room)
        assert math.isclose(update, rms(b.double() - a.double()), rel_tol=1e-5, abs_tol=room)


@pytest.mark.parametrize("backend", ["triton", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"ecc": "int8"}, {"param_ecc": "bf16+8", "ecc": "bf16+8"}, {"gradient_clipping": "global_l2norm_clip"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "Lion", "NAdam", "Muon", "SOAP"])
def test_they_are_true_and_weights_are_the_same_bit_for_bit(name, options, backend):
    (expected, plain), (params, optimizer) = (built(name, compile=backend, report_norms=r, **options) for r in (False, True))
    for t in range(5):
        give(params, t)
        give(expected, t)
        before = weights(params, optimizer)
        plain.step()
        optimizer.step()
        assert all(map(torch.equal, params, expected))
        if t:  # a first step may only prime
            agree(optimizer.norms(), before, weights(params, optimizer), 2**-15 if "param_ecc" in options else 2**-23)


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW"])
def test_no_step_waits_for_them(name):
    params, optimizer = built(name, report_norms=True, consume_grad=False)
    for t in range(3):
        give(params, t)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.norms().keys() == set("abcdefg")


def test_a_captured_step_reports_its_last_replay():
    params, optimizer = built("AdamW", report_norms=True, capturable=True, consume_grad=False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for t in range(3):
            give(params, t)
            optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for t in range(3, 6):
        give(params, t)
        before = weights(params, optimizer)
        graph.replay()
        agree(optimizer.norms(), before, weights(params, optimizer), 2**-23)


def test_they_cost_little():
    """A step on 64 million elements, whose time is that of its memory traffic."""
    times = {}
    for reported in (False, True, False, True):
        params = [nn.Parameter(torch.randn(1024, 1024, device=DEVICE)) for _ in range(64)]
        optimizer = hbcore.get("AdamW")(params, report_norms=reported, consume_grad=False)
        give(params, 0)
        for _ in range(5):
            optimizer.step()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            optimizer.step()
        end.record()
        torch.cuda.synchronize()
        times[reported] = min(start.elapsed_time(end) / 20, times.get(reported, math.inf))
    assert times[True] < 1.3 * times[False], times
