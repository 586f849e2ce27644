"""Tensors of a checkpoint as a parameter's state has them: on its device, in its memory order, sharded like it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.placement import is_dtensor, local, shards_of, share_out, spread_like, spread_part, spread_rows
from hbcore.state.expected import Logical


def spread_slot(slot: Logical, part: Tensor, param: Tensor) -> Tensor:
    """A slot's stored tensor as the parameter's state has it."""
    if slot.flat:
        return spread_rows(part, param, slot.shape[param.ndim :])
    return part if slot.scalar else spread_part(part, param)


def spread(whole: Tensor, param: Tensor) -> Tensor:
    """A copy of ``whole``, of the parameter's shape, on its device and in its memory order; sharded like it."""
    shards = shards_of(param)
    if shards is not None:
        return share_out(whole.detach().to(local(param).device), shards)
    here = local(param.detach())
    if whole.shape != here.shape:  # one number for each block
        return whole.detach().to(here.device, copy=True, memory_format=torch.contiguous_format)
    return torch.empty_like(here, dtype=whole.dtype, requires_grad=False).copy_(whole)


def spread_as(part: Tensor, like: Tensor, param: Tensor, shape: torch.Size) -> Tensor:
    """This rank's ``part`` as a DTensor of ``shape``, sharded like ``like``; ``part`` itself if ``like`` is not sharded."""
    if not is_dtensor(like):
        return part
    if like.shape == param.shape == shape:
        return spread_like(part, param)
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    stride = like.stride() if like.shape == shape else torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, sharded.device_mesh, sharded.placements, run_check=False, shape=shape, stride=stride)
