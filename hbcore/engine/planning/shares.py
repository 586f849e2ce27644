"""Which parameters' offloaded state travels together."""

from __future__ import annotations

from torch import Tensor

from hbcore.distributed.placement import is_dtensor
from hbcore.engine import offload
from hbcore.engine.core import Group, OptimizerCore
from hbcore.errors import OptionError


def shares_of(core: OptimizerCore) -> dict[Tensor, int]:
    """Parameter -> which share of the state its segments' slots belong to; 0 for all if nothing is offloaded.

    It follows from the groups alone, so that segments stay the same whichever parameters have a gradient.

    Raises:
        OptionError: state is to be offloaded, and a parameter is sharded.
    """
    found: dict[Tensor, int] = {}
    share = filled = 0
    for g, group in enumerate(core.groups):
        for i, p in enumerate(group["params"]):
            size = 0
            if core.settings.offload is not None and p.numel() and is_dtensor(p):
                raise OptionError(
                    f"{core.name_of(g, i)} is sharded, which offload={core.settings.offload!r} does not support; shard the "
                    "model with fully_shard(..., offload_policy=CPUOffloadPolicy()) and pass offload=None."
                )
            if offload.applies(core.settings.offload, p.device) and p.numel():
                size = _size(core, group, p)
            if filled and filled + size > offload.SHARE:
                share, filled = share + 1, 0
            found[p] = share
            filled += size
    return found


def _size(core: OptimizerCore, group: Group, p: Tensor) -> int:
    """Bytes of a parameter's slots but for those of matrix rules, which lie in stacks."""
    slots = [slot for slot in core.chain.expected(group, p) if not (slot.matrix or slot.flat or slot.scalar)]
    return sum(slot.part_shape(name).numel() * d.itemsize for slot in slots for name, d in slot.parts(p).items())
