"""What the ranks do with a rule that needs Hessian-vector products. Module-level functions, so that they can be sent."""

from __future__ import annotations

import warnings

import torch
from core.newton import Keeping, batch, network
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hbcore.distributed.placement import gathered
from hbcore.errors import FallbackWarning, OptionError


def follow(rank, ranks, how, **options):
    """A step on this rank's part of a batch: each slot of each parameter, the parameters, and how often the closure ran."""
    model = network(torch.float64)
    if how == "fsdp":
        fully_shard(model)
    wrapped = DistributedDataParallel(model) if how == "ddp" else model
    optimizer, calls = Keeping(model.named_parameters(), **options), []

    def closure():
        optimizer.zero_grad()
        loss = wrapped(batch(dtype=torch.float64).chunk(ranks)[rank]).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        optimizer.step(closure)
    state = optimizer.state_dict()["state"].values()
    kept = {name: [gathered(entry[name]).double() for entry in state] for name in ("vector", "product", "found")}
    return {**kept, "params": [gathered(p.detach()) for p in model.parameters()], "calls": len(calls)}


def refused(rank, closure, options):
    """What a step on sharded parameters says, of which the second rank has none."""
    model = torch.nn.Linear(3, 1, bias=False)
    fully_shard(model)
    optimizer = Keeping(model.named_parameters(), **options)

    def both():
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        return loss

    try:
        if closure:
            optimizer.step(both)
        else:
            both()
            optimizer.step()
    except OptionError as error:
        return str(error)
    return ""
