"""How one parameter is spread over ranks. Rules never see any of it; the engine computes on what is local.

An ordinary tensor is whole wherever it is. A DTensor, as FSDP2 makes them, is ``Shard(0)`` over the last dimension of its mesh:
each rank has a run of its rows, and perhaps none. Earlier mesh dimensions may replicate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hbcore.errors import ParameterError


@dataclass(frozen=True)
class Shards:
    """The ranks that a parameter's rows are dealt out to.

    Attributes:
        mesh: the parameter's device mesh.
        placements: one for each mesh dimension; ``Shard(0)`` last.
        shape, stride: of the whole parameter.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that together hold the whole parameter."""
        group: dist.ProcessGroup = self.mesh.get_group(self.mesh.ndim - 1)
        return group

    @property
    def ranks(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this process is."""
        return dist.get_rank(self.group)

    def sizes(self) -> list[int]:
        """How many elements each rank holds, in order: the first ranks as many rows as fit, the last what is left."""
        rows = self.shape[0]
        each = -(-rows // self.ranks)
        per_row = self.shape.numel() // rows if rows else 0
        return [per_row * max(0, min(each, rows - r * each)) for r in range(self.ranks)]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is spread over a mesh; asks without importing torch.distributed.tensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def shards_of(param: Tensor) -> Shards | None:
    """How ``param`` is spread, or None if it is whole.

    Raises:
        ParameterError: its placements are none that this version knows.
    """
    if not is_dtensor(param):
        return None
    if param.is_complex():
        raise ParameterError(f"a complex parameter of shape {tuple(param.shape)} is spread over ranks; keep it whole.")
    spread: Any = param
    placements = tuple(spread.placements)
    if not placements[-1].is_shard(0) or not all(p.is_replicate() for p in placements[:-1]):
        raise ParameterError(
            f"a parameter of shape {tuple(param.shape)} is placed {placements}; hbcore knows Shard(0), with or without "
            "replication before it. Shard it with torch.distributed.fsdp.fully_shard."
        )
    return Shards(spread.device_mesh, placements, param.shape, tuple(param.stride()))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the tensor itself if it is whole; complex numbers as pairs of real ones."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    if not is_dtensor(tensor):
        return tensor
    spread: Any = tensor
    part: Tensor = spread.to_local()
    return part


def spread_like(part: Tensor, param: Tensor) -> Tensor:
    """``part``, of the shape of this rank's part of ``param``, as a tensor spread as ``param`` is."""
    shards = shards_of(param)
    if shards is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, shards.mesh, shards.placements, run_check=False, shape=shards.shape, stride=shards.stride)


def share_out(whole: Tensor, shards: Shards) -> Tensor:
    """A tensor that every rank has whole as one that is sharded along its rows; a 0-d one is replicated."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if whole.ndim == 0:
        return DTensor.from_local(whole, shards.mesh, [Replicate()] * shards.mesh.ndim, run_check=False)
    each = -(-whole.shape[0] // shards.ranks)
    part = whole[each * shards.rank : each * (shards.rank + 1)].clone()
    placements: Sequence[Any] = [Replicate()] * (shards.mesh.ndim - 1) + [Shard(0)]
    return DTensor.from_local(
        part, shards.mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank. Collective for a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    spread: Any = tensor
    whole: Tensor = spread.full_tensor()
    return whole
