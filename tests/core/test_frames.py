"""How much Python a steady step is: what every step of every user pays, and what a reader has to follow."""

from __future__ import annotations

import sys

import pytest
import torch

import hbcore


@pytest.mark.parametrize(("name", "most"), [("AdamW", 71), ("Muon", 201)])
def test_a_steady_step_takes_few_frames(name, most):
    """Calls of Python functions in an eager step on one 64 x 64 matrix, those of torch's operations included."""
    p = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    optimizer, calls = hbcore.get(name)([p], compile="eager"), 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    for steady in (False, False, True):
        p.grad = torch.ones_like(p)
        before = sys.getprofile()
        if steady:
            sys.setprofile(count)
        try:
            optimizer.step()
        finally:
            sys.setprofile(before)
    assert 20 < calls <= most
