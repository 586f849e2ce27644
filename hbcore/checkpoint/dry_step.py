"""The dry step that torch.distributed.checkpoint takes to make a fresh optimizer allocate its state."""

from __future__ import annotations

import torch

from hbcore.checkpoint.save import whole_entry
from hbcore.distributed.exchange import all_reduce, owners
from hbcore.distributed.placement import is_dtensor, local, shards_of
from hbcore.engine.core import OptimizerCore
from hbcore.engine.offload import sent_home


def is_dry(core: OptimizerCore) -> bool:
    """Whether this step only serves to allocate state: it must not move parameters or count.

    True if there is no state yet, and every learning rate and every gradient is 0 on all ranks.
    """
    if core.state or any(float(group["lr"]) != 0 for group in core.groups):
        return False
    params = [p for group in core.groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    flags = torch.tensor([bool(grads), any(bool(local(g).any()) for g in grads)], dtype=torch.float32, device="cpu")
    sharded = next((p for p in params if is_dtensor(p)), None)
    if sharded is not None:  # every rank takes part, with or without gradients
        flags = flags.to(local(sharded).device)
        shards = shards_of(sharded)
        assert shards is not None
        all_reduce(flags, "amax", shards)
    return bool(flags[0]) and not bool(flags[1])


def allocate(core: OptimizerCore) -> None:
    """Create the initial state of every parameter that has a gradient."""
    owned = owners(p for group in core.groups for p in group["params"])
    for group in core.groups:
        for p in group["params"]:
            if p.grad is not None:
                core.state[p] = sent_home(core.settings.offload, p, whole_entry(core, group, p, owned))
