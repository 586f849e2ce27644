"""Random numbers of matrix rules on a CUDA device: the CPU's, beyond 2^31 elements too, from a kernel that is compiled once."""

from __future__ import annotations

import pytest
import torch
from core.rules import matrix, optimizer_with

from hbcore.api import Slot
from hbcore.rules import launching, row_noise
from hbcore.rules.row_noise import bits, normal, uniform

pytestmark = pytest.mark.gpu

KEYS = torch.tensor([3, -5, 2**62 + 77, 0, -(2**63)])
KINDS = {"bits": bits, "uniform": uniform, "normal": normal}
NEAR = 4e-7
"""How far normal numbers may be apart, relative to the larger of 1 and their pair's distance from 0."""


def agree(kind, ours, theirs):
    if kind != "normal":
        return torch.equal(ours, theirs)
    a, b = (torch.nn.functional.pad(x, (0, x.shape[1] % 2)).unflatten(1, (-1, 2)).double() for x in (ours, theirs))
    return float(((a - b).abs().amax(-1) / b.norm(dim=-1).clamp(min=1)).max()) < NEAR


@pytest.mark.parametrize("numel", [1, 3, 4, 2047, 2048, 2049, 1_000_000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_draws_the_cpus_numbers(kind, numel):
    for step, draw in ((0, 0), (1, 1), (16, 7), (2**31 + 5, 2**32 - 1)):
        ours, theirs = KINDS[kind](KEYS.cuda(), numel, step, draw), KINDS[kind](KEYS, numel, step, draw)
        assert ours.is_cuda and agree(kind, ours.cpu(), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_draws_on_the_device_is_the_same(kind):
    out = torch.empty(len(KEYS), 5001, dtype=torch.int32 if kind == "bits" else torch.float32, device="cuda")
    row_noise.fill(kind, KEYS.cuda(), out, 3, 4)
    assert agree(kind, out.cpu(), KINDS[kind](KEYS, 5001, 3, 4))


@pytest.mark.parametrize("shape", [(5, 2**29), (2, 2**30 + 3), (1, 2**31 + 9)], ids=str)
def test_a_stack_may_have_more_than_two_thousand_million_elements(shape):
    rows, numel = shape
    if torch.cuda.mem_get_info()[0] < 12 * rows * numel:
        pytest.skip("needs more memory")
    whole = uniform(KEYS[:rows].cuda(), numel, 2, 1)
    first = numel // 4 - 250
    count = -(-numel // 4) - first
    drawn = row_noise.words(KEYS[:rows], first, count, 2, 1, torch.empty(5, rows * count, dtype=torch.int64))
    wanted = torch.stack([word >> 8 for word in drawn], -1).flatten(1).float() * 2.0**-24
    assert torch.equal(whole[:, 4 * first :].cpu(), wanted[:, : numel - 4 * first])
    assert torch.equal(whole[:, :4000].cpu(), uniform(KEYS[:rows], 4000, 2, 1))


def test_a_new_step_compiles_nothing_and_waits_for_nothing():
    keys = KEYS.cuda()
    for numel in (2048, 2049):
        normal(keys, numel, 1, 1)
    before = launching._launcher.cache_info().misses
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (2, 3, 16, 2**24, 2**31):
            for numel in (64, 2049, 3333):
                normal(keys, numel, step, step % 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert launching._launcher.cache_info().misses == before


def test_a_matrix_rule_draws_and_rounds_as_on_the_cpu():
    def update(self, u, s, c):
        return u, {"a": c.noise(u), "b": c.probe(u), "m": s["m"] + 2.0**-10}

    def slots(self, p):
        return {name: Slot(p.shape, exact=True) for name in "ab"} | {"m": Slot(p.shape, 1.0, dtype=torch.bfloat16)}

    results = []
    for device in ("cuda", "cpu"):
        params = [torch.nn.Parameter(torch.ones(40, 30, device=device)) for _ in range(3)]
        rule = matrix(update, slots)
        optimizer = optimizer_with(lambda h, rule=rule: (rule(h.beta),))(params)
        for without in (None, 1, None):
            for i, p in enumerate(params):
                p.grad = None if i == without else torch.ones_like(p)
            optimizer.step()
        results.append([{name: optimizer.state[p][name].cpu() for name in "abm"} for p in params])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours["a"], theirs["a"]) and torch.equal(ours["m"], theirs["m"])
        assert agree("normal", ours["b"].view(1, -1), theirs["b"].view(1, -1))
