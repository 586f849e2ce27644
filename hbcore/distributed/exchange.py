"""Exchange between shards and owners: gathers every rank's rows on the owner of a tensor, and scatters the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hbcore.distributed.placement import Shards, shards_of


@dataclass
class Transfer:
    """The transfer of one tensor between its shards and its owner.

    Attributes:
        part: this rank's elements, flat; empty on a rank without rows.
        whole: all elements, flat, on the owner; None on other ranks.
        owner: the rank that holds the whole tensor.
        sizes: number of elements on each rank.
    """

    part: Tensor
    whole: Tensor | None
    owner: int
    sizes: Sequence[int]


def to_owners(transfers: Sequence[Transfer], shards: Shards) -> None:
    """Gather: fill each transfer's ``whole`` on its owner. Collective; all ranks pass the same transfers in the same order."""
    mine, theirs = _mine(transfers, shards.rank), _by_owner(transfers, shards.ranks)
    leaving = [[p.part for p in group] for group in theirs]
    coming = [sum(p.sizes[r] for p in mine) for r in range(shards.ranks)]
    for r, run in enumerate(_swap(leaving, coming, transfers[0].part, shards)):
        for p, piece in zip(mine, torch.split(run, [p.sizes[r] for p in mine]), strict=True):
            assert p.whole is not None
            p.whole[_rows(p, r)] = piece


def from_owners(transfers: Sequence[Transfer], shards: Shards) -> None:
    """Scatter: fill each transfer's ``part`` from its owner's ``whole``. Collective, like :func:`to_owners`."""
    mine, theirs = _mine(transfers, shards.rank), _by_owner(transfers, shards.ranks)
    leaving = [[p.whole[_rows(p, r)] for p in mine if p.whole is not None] for r in range(shards.ranks)]
    coming = [sum(p.part.numel() for p in group) for group in theirs]
    for group, run in zip(theirs, _swap(leaving, coming, transfers[0].part, shards), strict=True):
        for p, piece in zip(group, torch.split(run, [p.part.numel() for p in group]), strict=True):
            p.part.copy_(piece)


def owners(params: Iterable[Tensor]) -> dict[Tensor, int]:
    """The owner of each sharded parameter: balanced by size, and identical on every rank.

    Each parameter in turn is assigned to the rank with the smallest load so far, so adding parameters later does not change
    existing owners.
    """
    loads: dict[object, list[int]] = {}
    assigned: dict[Tensor, int] = {}
    for p in params:
        shards = shards_of(p)
        if shards is not None:
            load = loads.setdefault(shards.mesh, [0] * shards.ranks)
            assigned[p] = load.index(min(load))
            load[assigned[p]] += p.numel()
    return assigned


def all_reduce(values: Tensor, how: str, shards: Shards) -> None:
    """Reduce ``values`` over the ranks in place: ``"sum"`` or ``"amax"``. Collective."""
    dist.all_reduce(values, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=shards.group)


def broadcast(whole: Tensor, owner: int, shards: Shards) -> None:
    """Copy the owner's tensor, which is contiguous, to every rank, in place. Collective. As bytes: no backend sends int16."""
    dist.broadcast(whole.view(-1).view(torch.uint8), dist.get_global_rank(shards.group, owner), group=shards.group)


def _mine(transfers: Sequence[Transfer], rank: int) -> list[Transfer]:
    return [p for p in transfers if p.owner == rank]


def _by_owner(transfers: Sequence[Transfer], ranks: int) -> list[list[Transfer]]:
    return [[p for p in transfers if p.owner == r] for r in range(ranks)]


def _rows(transfer: Transfer, rank: int) -> slice:
    start = sum(transfer.sizes[:rank])
    return slice(start, start + transfer.sizes[rank])


def _swap(leaving: Sequence[Sequence[Tensor]], coming: list[int], like: Tensor, shards: Shards) -> list[Tensor]:
    """Send ``leaving[r]`` to each rank r in one all-to-all; return the elements received from each rank."""
    outgoing = torch.cat([like[:0], *(t.reshape(-1) for group in leaving for t in group)])
    incoming = outgoing.new_empty(sum(coming))
    sizes = [sum(t.numel() for t in group) for group in leaving]
    dist.all_to_all_single(incoming, outgoing, coming, sizes, group=shards.group)
    return list(torch.split(incoming, coming))
