"""How hb_muon's Triton kernels are launched."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def aligned(*tensors: Tensor) -> bool:
    """Whether the kernels that are made for addresses of 16 bytes take the tensors."""
    return not any(t.data_ptr() % 16 for t in tensors)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    compiled: Callable[[], Any],
    arguments: Any,
    **meta: int,
) -> None:
    """Run ``kernel`` over ``grid``, on the device of the last tensor.

    Args:
        tensors: what its pointers point to.
        compiled: gives the kernel for aligned tensors, compiled and remembered: launching that takes a fifth of the time that
            Triton's own look-up takes.
        arguments: all of the kernel's arguments.
        meta: what the look-up needs besides: ``num_warps``, ``num_stages``.
    """
    with on(tensors[-1].device):
        if INTERPRETED or not aligned(*tensors):
            kernel[grid](*arguments, **meta)
        else:
            compiled()[grid](*arguments)


def pieces(length: int, size: int) -> int:
    """How many pieces of ``size`` a length takes. Triton's own function for it takes longer than a launch should."""
    return -(-length // size)


def power_of_two(count: int) -> int:
    """The least power of two that is no less than a count."""
    return 1 << (count - 1).bit_length()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which ``device`` is the current one; entering one that is takes nothing."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
