"""What the ranks do with a rule that needs Hessian-vector products. Module-level functions, so that they can be sent."""

from __future__ import annotations

import warnings

import torch
from core.newton import Keeping, batch, kept, network
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hbcore.errors import FallbackWarning, ParameterError


def follow(rank, ranks):
    """A step on this rank's part of a batch; the vectors and products, and how often the closure ran."""
    model = network(torch.float64)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer, calls = Keeping(model.named_parameters()), []

    def closure():
        optimizer.zero_grad()
        loss = wrapped(batch(dtype=torch.float64).chunk(ranks)[rank]).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        optimizer.step(closure)
    return kept(optimizer, model, "vector"), kept(optimizer, model, "product"), len(calls)


def sharded(rank):
    """What a step on sharded parameters says."""
    model = network()
    fully_shard(model)
    optimizer = Keeping(model.named_parameters())
    try:
        optimizer.step(lambda: model(batch()).square().mean().backward())
    except ParameterError as error:
        return str(error)
    return ""
