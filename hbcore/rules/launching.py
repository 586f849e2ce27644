"""Launching hand-written Triton kernels, in less time than Triton itself needs to find the compiled one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hbcore.rules.direct_launch import Launcher, launcher_of

_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""Without the check whether CUDA is initialised, which it is where a tensor is on a GPU."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def aligned(*tensors: Tensor) -> bool:
    """Whether the tensors' addresses are multiples of 16 bytes, which :func:`launch` needs for its compiled kernels."""
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
        tensors: those that its pointers point to.
        compiled: returns the cached compiled kernel for aligned tensors; launching it takes a tenth of the time of Triton's own
            look-up.
        arguments: all of the kernel's arguments.
        meta: further arguments of the look-up: ``num_warps``, ``num_stages``.
    """
    device = tensors[-1].device
    with on(device):
        if INTERPRETED or not aligned(*tensors):
            kernel[grid](*arguments, **meta)
        else:
            addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
            launcher_of(compiled(), device.index)(grid, addresses)


def run(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...] = (),
    sizes: tuple[int, ...] = (),
    constants: tuple[int, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    counts: tuple[int, ...] = (),
) -> None:
    """The same for a kernel that takes tensors, then floats, then counts, then sizes, then ``constexpr`` integers.

    Counts are integers that may differ from call to call; the kernel declares them with ``do_not_specialize``. For each new
    tuple of sizes it is compiled anew.
    """
    index = tensors[-1].get_device()
    if index >= 0 and index != _current_device():
        with torch.cuda.device(index):
            run(kernel, grid, tensors, numbers, sizes, constants, num_warps, num_stages, counts)
        return
    addresses, bits = [t.data_ptr() for t in tensors], 0
    for address in addresses:
        bits |= address
    if INTERPRETED or bits & 15:
        arguments = (*tensors, *numbers, *counts, *sizes, *constants)
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages)
        return
    dtypes = tuple([t.dtype for t in tensors])
    wide = tuple([not -(2**31) <= count < 2**31 for count in counts]) if counts else ()
    launcher = _launcher(kernel.warmup, index, dtypes, len(numbers), wide, sizes, constants, num_warps, num_stages)
    launcher(grid, (*addresses, *numbers, *counts, *sizes, *constants))  # of tensors it would ask for addresses


@lru_cache(maxsize=512)
def _launcher(
    warmup: Callable[..., Any],
    device: int,
    dtypes: tuple[torch.dtype, ...],
    numbers: int,
    wide: tuple[bool, ...],
    sizes: tuple[int, ...],
    constants: tuple[int, ...],
    num_warps: int,
    num_stages: int,
) -> Launcher:
    """What launches a kernel compiled for 16-byte aligned tensors on the current ``device``; ``wide`` counts have 64 bits.

    Args:
        warmup: the kernel's method, which is compared by identity; the hash of a kernel is that of its source.
    """
    counts = [2**40 if each else 2 for each in wide]
    arguments = (*dtypes, *[1.0] * numbers, *counts, *sizes, *constants)
    return launcher_of(warmup(*arguments, grid=(1, 1, 1), num_warps=num_warps, num_stages=num_stages), device)


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether kernels can be compiled at all; torch for GPUs usually brings Triton with it."""
    return find_spec("triton") is not None


def pieces(length: int, size: int) -> int:
    """``length / size``, rounded up. Triton's own function takes longer than a launch should."""
    return -(-length // size)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which ``device`` is the current one; free if it already is."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
