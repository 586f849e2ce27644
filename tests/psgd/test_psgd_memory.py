"""What the PSGD family needs of memory."""

from __future__ import annotations

import pytest
import torch
from launches import Peak, stack_of

import hbcore
from hb_psgd.rule import PreconditionByKron
from hbcore.rules.products import Split, Triple

CONVOLUTIONS = ((64, 3, 7, 7), (128, 64, 3, 3), (256, 128, 3, 3), (512, 256, 3, 3))


def state_of(name, shapes, **options):
    """The elements of parameters, and of their state."""
    params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    optimizer = hbcore.get(name)(params, **options)
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    kept = sum(t.numel() for p in params for t in optimizer.state[p].values())
    return sum(p.numel() for p in params), kept


@pytest.mark.parametrize("name", ["PSGDKron", "PSGDPRO", "QSGD", "LATHER"])
def test_four_convolutions_have_less_state_than_four_times_their_parameters(name):
    numel, kept = state_of(name, CONVOLUTIONS, preconditioner_update_probability=0)
    assert kept < 4 * numel


GPT2 = [(12, 768, 2304), (12, 768, 768), (12, 768, 3072), (12, 3072, 768)]
"""The stacks of GPT-2's hidden matrices."""

NUMEL = sum(rows * m * n for rows, m, n in GPT2)
INPUTS = 4
"""Bytes a parameter that the stacks' inputs take during a step."""

MOST = {("split", True): 9.8, ("split", False): 5.7, ("ieee", True): 9.2, ("ieee", False): 5.4}


@pytest.mark.parametrize(("how", "refresh"), MOST, ids=str)
def test_a_step_needs_at_most_ten_bytes_a_parameter(how, refresh, monkeypatch):
    pytest.importorskip("hb_psgd.fitting_kernel", reason="needs Triton", exc_type=ImportError)
    rule, products = PreconditionByKron(), Split(Triple()) if how == "split" else Triple()
    stacks = [stack_of(rule, products, shape, refresh) for shape in GPT2]
    with Peak(monkeypatch, [(x, dict(s)) for x, s, _ in stacks]) as peak:
        results = iter(rule.update_stacks(stacks))
        for _ in stacks:
            next(results)  # and let go of it, as the engine does
    assert 0.7 * MOST[how, refresh] < INPUTS + peak.peak / NUMEL <= MOST[how, refresh]
