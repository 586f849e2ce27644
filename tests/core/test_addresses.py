"""Where tensors lie: with the call of torch's builds for GPUs, and without it."""

from __future__ import annotations

import struct

import pytest
import torch

from hbcore.engine import addresses
from hbcore.engine.addresses import Addresses, Pointers


def compared(tensors, known, each):
    """What torch's call returns."""
    return all(tensors[i].data_ptr() == address for i, address in zip(each, known, strict=True))


@pytest.fixture(params=[None, compared], ids=["each", "one call"])
def _call(request, monkeypatch):
    monkeypatch.setattr(addresses, "_same", request.param)


@pytest.mark.usefixtures("_call")
def test_a_tensor_that_moved_is_noticed():
    tensors = [torch.zeros(4), torch.zeros(4)]
    known = Addresses(tensors)
    assert known.unchanged()
    assert known.unchanged([t.view(2, 2) for t in tensors])
    assert not known.unchanged([tensors[0], tensors[1][1:]])
    tensors[1].data = torch.zeros(4)
    assert not known.unchanged()


@pytest.mark.usefixtures("_call")
def test_pointers_are_those_of_the_tensors_that_are_asked_for():
    memory, pointers = torch.zeros(100), Pointers()
    for offsets in ((0, 8), (16, 24), (0, 8), (8, 0), (0,), (), (0, 8, 16), (16, 24), (0, 9), (0, 8)):
        tensors = [memory[i : i + 4] for i in offsets]
        assert pointers.of(tensors) == struct.pack(f"{len(offsets)}q", *(t.data_ptr() for t in tensors))
