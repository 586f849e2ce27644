"""How a parameter is sharded. Rules never see this: the engine computes on local shards.

An ordinary tensor is not sharded. A DTensor of FSDP2 is ``Shard(0)`` over the last dimension of its mesh: each rank has a
contiguous range of rows, possibly an empty one. Earlier mesh dimensions may replicate it.
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
    """How a parameter's rows are distributed over ranks.

    Attributes:
        mesh: the parameter's device mesh.
        placements: one per mesh dimension; the last is ``Shard(0)``.
        shape, stride: shape and strides of the whole parameter.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group whose ranks together hold the whole parameter."""
        group: dist.ProcessGroup = self.mesh.get_group(self.mesh.ndim - 1)
        return group

    @property
    def ranks(self) -> int:
        """Number of ranks in the group."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return dist.get_rank(self.group)

    def sizes(self) -> list[int]:
        """Number of elements on each rank: ``ceil(rows / ranks)`` rows on the first ranks, the remainder on later ones."""
        rows = self.shape[0]
        each = -(-rows // self.ranks)
        per_row = self.shape.numel() // rows if rows else 0
        return [per_row * max(0, min(each, rows - r * each)) for r in range(self.ranks)]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, without importing torch.distributed.tensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def shards_of(param: Tensor) -> Shards | None:
    """How ``param`` is sharded, or None if it is not.

    Raises:
        ParameterError: its placements are not supported, or it is complex.
    """
    if not is_dtensor(param):
        return None
    if param.is_complex():
        raise ParameterError(
            f"a complex parameter of shape {tuple(param.shape)} is sharded, which is unsupported; keep it whole."
        )
    dtensor: Any = param
    placements = tuple(dtensor.placements)
    if not placements[-1].is_shard(0) or not all(p.is_replicate() for p in placements[:-1]):
        raise ParameterError(
            f"a parameter of shape {tuple(param.shape)} has the placements {placements}; hbcore supports Shard(0), with or "
            "without replication before it. Shard it with torch.distributed.fsdp.fully_shard."
        )
    return Shards(dtensor.device_mesh, placements, param.shape, tuple(param.stride()))


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor itself if it is not sharded; complex numbers as pairs of real ones."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    if not is_dtensor(tensor):
        return tensor
    dtensor: Any = tensor
    part: Tensor = dtensor.to_local()
    return part


def spread_like(part: Tensor, param: Tensor) -> Tensor:
    """A tensor sharded like ``param``, whose shard on this rank is ``part``."""
    shards = shards_of(param)
    if shards is None:
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, shards.mesh, shards.placements, run_check=False, shape=shards.shape, stride=shards.stride)


def spread_part(part: Tensor, param: Tensor) -> Tensor:
    """A tensor sharded by rows like ``param``, whose shard on this rank is ``part``: of the parameter's shape, or contiguous
    with one entry for each block of elements in a row."""
    if part.shape == local(param.detach()).shape:
        return spread_like(part, param)
    shards = shards_of(param)
    if shards is None:
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((shards.shape[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, shards.mesh, shards.placements, run_check=False, shape=shape, stride=stride)


def spread_rows(part: Tensor, param: Tensor, rest: Sequence[int]) -> Tensor:
    """A tensor of ``param``'s shape and ``rest`` beyond, sharded like it, whose shard on this rank is ``part``; contiguous."""
    shards = shards_of(param)
    if shards is None:
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*shards.shape, *rest))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, shards.mesh, shards.placements, run_check=False, shape=shape, stride=stride)


def share_out(whole: Tensor, shards: Shards) -> Tensor:
    """Shard a tensor that every rank has along its rows; a 0-d tensor is replicated."""
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
    """The whole tensor on every rank. Collective for a DTensor."""
    if not is_dtensor(tensor):
        return tensor
    dtensor: Any = tensor
    if tensor.dtype == torch.int16:  # which no backend sends
        dtensor = dtensor.int()
    whole: Tensor = dtensor.full_tensor().to(tensor.dtype)
    return whole
