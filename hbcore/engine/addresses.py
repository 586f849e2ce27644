"""Where tensors lie in memory: whether some were moved, and the addresses as a kernel's tables take them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from struct import pack

import torch
from torch import Tensor

_same: Callable[[list[Tensor], list[int], list[int]], bool] | None = getattr(
    torch._C, "_tensors_data_ptrs_at_indices_equal", None
)
"""Compares addresses in one call; builds of torch for GPUs have it."""


class Addresses:
    """Where tensors lie, to tell whether some were moved: by ``t.data = ...``, which replaces no object."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._each = list(range(len(self._tensors)))

    def unchanged(self, now: list[Tensor] | None = None) -> bool:
        """Whether they lie where they lay; or other tensors, ``now``, that are to be the same memory."""
        tensors = self._tensors if now is None else now
        if _same is not None:
            return _same(tensors, self._addresses, self._each)
        return list(map(Tensor.data_ptr, tensors)) == self._addresses


def as_bytes(*columns: Iterable[int]) -> bytes:
    """Integers of 64 bits as memory has them, one column after the other."""
    values = [value for column in columns for value in column] if len(columns) > 1 else [*columns[0]]
    return pack(f"{len(values)}q", *values)


class Pointers:
    """The addresses of a batch's gradients as bytes, 64 bits each.

    Gradients are other tensors in every step, but often lie where those of an earlier one lay. One call tells that in less time
    than it takes to ask each for its address.
    """

    KEPT = 2
    """How many steps' addresses are kept."""

    def __init__(self) -> None:
        self._kept: deque[tuple[list[int], list[int], bytes]] = deque(maxlen=self.KEPT)

    def of(self, tensors: list[Tensor]) -> bytes:
        """The addresses of ``tensors``."""
        if _same is not None:
            for addresses, each, data in self._kept:
                if len(each) == len(tensors) and _same(tensors, addresses, each):
                    return data
        addresses = list(map(Tensor.data_ptr, tensors))
        data = as_bytes(addresses)
        self._kept.append((addresses, list(range(len(addresses))), data))
        return data
