"""What the PSGD family needs of memory."""

from __future__ import annotations

import pytest
import torch

import hbcore

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
