"""Memory of an optimizer: its state, the temporary peak of a step, and the minimum traffic of a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, torch.dtype, torch.device)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterable[Tensor]:
    """Every tensor in ``value``: in mappings, sequences and attributes of objects (such as quantised tensors)."""
    seen = set() if seen is None else seen
    if isinstance(value, _PLAIN) or callable(value) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item, seen)
    else:
        yield from tensors_in(getattr(value, "__dict__", None), seen)


def state_bytes(optimizer: Any) -> int:
    """Bytes of the distinct storages in ``optimizer.state``.

    Views share a storage (rows of a stack, step counters). Some rules keep the parameter itself in their state, which takes no
    extra memory.
    """
    own = {_address(p) for group in optimizer.param_groups for p in group["params"]}
    sizes = {_address(t): t.untyped_storage().nbytes() for t in tensors_in(dict(optimizer.state))}
    return sum(size for address, size in sizes.items() if address not in own)


def _address(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def traffic_bytes(parameters: Iterable[Tensor], state: int) -> int:
    """Minimum bytes moved by a step: it reads and writes parameters and state, and reads gradients of the parameters' dtype."""
    return sum(3 * p.numel() * p.element_size() for p in parameters) + 2 * state


def peak_bytes(device: torch.device, step: Callable[[], Any]) -> int | None:
    """Peak allocation of ``step()`` in bytes, on top of what is already allocated. None where torch does not track it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None if unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
