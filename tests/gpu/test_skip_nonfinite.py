"""``skip_nonfinite=True`` on a GPU: nothing waits within a step, and captured steps skip too."""

from __future__ import annotations

import math

import pytest
import torch
from core.kit import parameters
from torch import nn

import hbcore

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = ((64, 48), (48,), (32, 32))


def attempt(params, t, bad=None):
    generator = torch.Generator(DEVICE).manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=DEVICE)
    if bad is not None:
        params[t % 3].grad.view(-1)[7] = bad


def built(name, **options):
    params = [nn.Parameter(p.detach().to(DEVICE)) for p in parameters(SHAPES)]
    return params, hbcore.get(name)(list(zip("abc", params, strict=True)), lr=0.01, skip_nonfinite=True, **options)


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "Muon"])
def test_a_run_is_the_same_without_the_bad_steps_and_no_step_waits(name):
    (expected, reference), (params, optimizer) = built(name), built(name)
    for t in range(5):
        attempt(expected, t)
        reference.step()
    for t, bad in ((0, None), (9, math.nan), (10, math.inf), (1, None), (2, None), (3, None), (11, math.nan), (4, None)):
        attempt(params, t, bad)
        if t in (2, 11):
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.report.skipped == 3
    assert all(map(torch.equal, params, expected))
    assert all(float(optimizer.state[p]["step"]) == 5 for p in params)
    assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]


def test_a_captured_step_skips():
    params, optimizer = built("AdamW", capturable=True, consume_grad=False)
    attempt(params, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    before = [p.detach().clone() for p in params]
    params[1].grad[3] = math.nan
    graph.replay()
    assert all(map(torch.equal, params, before))
    params[1].grad[3] = 1.0
    graph.replay()
    assert not any(map(torch.equal, params, before))
    assert optimizer.report.skipped == 1
    assert {float(optimizer.state[p]["step"]) for p in params} == {3.0}
