"""Which parameters' offloaded state travels together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from hbcore.distributed.placement import is_dtensor
from hbcore.engine import offload
from hbcore.engine.core import Group, OptimizerCore
from hbcore.engine.graph.program import NONFINITE, Program
from hbcore.engine.planning.segments import Member, Segment
from hbcore.errors import OptionError
from hbcore.state.blocks import BLOCK


class Share(NamedTuple):
    """Which share of the state a parameter's belongs to; or the first of several, if it is too much for one."""

    first: int
    pieces: int = 1


def shares_of(core: OptimizerCore) -> dict[Tensor, Share]:
    """Each parameter's share of the state of segments; the first for all if nothing is offloaded.

    It follows from the groups alone, so that segments stay the same whichever parameters have a gradient.

    Raises:
        OptionError: state is to be offloaded, and a parameter is sharded.
    """
    found: dict[Tensor, Share] = {}
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
            found[p] = Share(share, max(1, -(-size // offload.SHARE)))
            share, filled = share + found[p].pieces - 1, filled + size
    return found


def divisible(program: Program | None) -> bool:
    """Whether a program may run on some of a tensor's elements: it treats each by itself, and has no sums over them."""
    if program is None or program.finish is not None or any(p.needs_numel for p in program.phases):
        return False
    return all(r.name == NONFINITE for r in program.reductions)


def pieces_of(m: Member, segments: Sequence[Segment]) -> list[Member]:
    """``m`` in pieces of whole blocks, one for each of the segments unless it is too small; without matrix rules."""
    numel, pieces = m.local.numel(), list[Member]()
    length = -(-numel // (len(segments) * BLOCK)) * BLOCK
    for segment, start in zip(segments, range(0, numel, length), strict=False):
        elements = slice(start, min(start + length, numel))
        blocks = slice(start // BLOCK, -(-elements.stop // BLOCK))
        slots = {name: blocks if name in segment.per_block else elements for name in m.held if name != "step"}
        twins = {name: offload.Twin.of(m.held, name, m.local.device, some) for name, some in slots.items()}
        pieces.append(
            replace(
                m,
                local=m.local.view(-1)[elements],
                segments=(segment,),
                stored={**m.stored, **{name: t.tensor for name, t in twins.items()}},
                twins=twins,
                elements=elements,
            )
        )
    return pieces


def _size(core: OptimizerCore, group: Group, p: Tensor) -> int:
    """Bytes of a parameter's slots but for those of matrix rules, which lie in stacks."""
    slots = [slot for slot in core.chain.expected(group, p) if not (slot.matrix or slot.flat or slot.scalar)]
    return sum(slot.part_shape(name).numel() * d.itemsize for slot in slots for name, d in slot.parts(p).items())
