"""What SOAP's rule needs of memory within a step, on a GPU."""

from __future__ import annotations

import pytest
import torch
from launches import Peak, stack_of

from hb_soap.rule import PreconditionBySOAP
from hbcore.rules.products import Split, Triple

pytest.importorskip("hbcore.rules.products_kernel", reason="needs Triton", exc_type=ImportError)

GPT2 = [(12, 768, 2304), (12, 768, 768), (12, 768, 3072), (12, 3072, 768)]
"""The stacks of GPT-2's hidden matrices."""

NUMEL = sum(rows * m * n for rows, m, n in GPT2)
INPUTS = 4
"""Bytes a parameter that the stacks' inputs take during a step."""

MOST = {("split", "update"): 7.1, ("split", "refresh"): 9.9, ("ieee", "update"): 6.7, ("ieee", "refresh"): 9.9}


@pytest.mark.parametrize(("how", "method"), MOST, ids=str)
def test_a_step_needs_at_most_ten_bytes_a_parameter(how, method, monkeypatch):
    rule, products = PreconditionBySOAP(), Split(Triple()) if how == "split" else Triple()
    stacks = [stack_of(rule, products, shape, True) for shape in GPT2]
    stacks = [(x, s, c._replace(apply=lambda inner, u, s: (torch.empty_like(u), {}))) for x, s, c in stacks]
    with Peak(monkeypatch, [(x, dict(s)) for x, s, _ in stacks]) as peak:
        if method == "update":
            for x, s, c in stacks:
                rule.update(x, s, c)
        else:
            results = iter(rule.refresh([(s, c) for _, s, c in stacks]))
            for _ in stacks:
                next(results)  # and let go of it, as the engine does
    assert 0.8 * MOST[how, method] < INPUTS + peak.peak / NUMEL <= MOST[how, method]
