"""A flat rule's vector is spread over two ranks, and is the same as in one process, absent gradients and late ones too."""

from __future__ import annotations

import pytest
import torch
from core.kit import distance
from distributed import jobs
from distributed.ranks import on_ranks

import hbcore

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def absent(step, name):
    """One parameter comes late, one is away at times: the one of which the second rank has nothing."""
    return (name == "tall" and step < 1) or (name == "row" and step in (2, 3))


def train(model, optimizer, steps):
    for step in steps:
        for name, p in model.named_parameters():
            p.grad = None if absent(step, name) else jobs.spread(jobs.gradient(step, name).to(p.dtype), p)
        optimizer.step()


def follow(rank, how):
    """Six steps straight, and three, a state dict and three; whole parameters, and the serial numbers of the vectors."""
    model, optimizer = jobs.build("PSGDLRA", {}, how)
    train(model, optimizer, range(6))
    first, before = jobs.build("PSGDLRA", {}, how)
    train(first, before, range(3))
    resumed = hbcore.get("PSGDLRA")(first.named_parameters(), **{k: before.defaults[k] for k in ("lr",)})
    resumed.load_state_dict(before.state_dict())
    train(first, resumed, range(3, 6))
    serials = [float(optimizer.state[p]["psgd_lra.vector"]) for p in model.parameters()]
    shapes = [tuple(optimizer.state[p]["U"].shape[:-1]) == tuple(p.shape) for p in model.parameters()]
    return jobs.whole(model), jobs.whole(first), serials, all(shapes)


def test_a_vector_with_absent_and_late_parameters_follows_one_process_and_resumes():
    alone, resumed, serials, shapes = follow(0, "alone")
    assert sorted(serials) == [1.0] * 6 + [2.0] and shapes
    assert all(torch.equal(alone[k], resumed[k]) for k in alone)
    for straight, again, numbers, alike in on_ranks(2, follow, "fsdp"):
        assert distance([straight[k] for k in alone], list(alone.values())) < 1e-6
        assert all(torch.equal(straight[k], again[k]) for k in alone)
        assert numbers == serials and alike
