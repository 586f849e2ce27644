"""What a checkpoint of unknown origin may contain: plain data, and tensors that are as large as they claim."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import CheckpointError

MOST = 10_000_000
"""More entries than any optimizer's state dict has: some of its containers contain themselves, or it is not one."""

KEYS = (str, int, float, bool, type(None))


def check(state_dict: Mapping[str, Any]) -> None:
    """Check every tensor of a state dict.

    Raises:
        CheckpointError: a tensor is not finite, is sparse, quantized or on no device, claims more elements than it has memory
            for, or containers contain themselves.
    """
    for where, tensor in tensors(state_dict):
        if problem := _problem(tensor):
            raise CheckpointError(f"{where} {problem}.")


def tensors(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers, with the path to it: ``"state[0]['exp_avg']"``. Without recursion: depth is the
    file's choice."""
    stack: list[tuple[str, Any]] = [("", tree)]
    count = 0
    while stack:
        where, value = stack.pop()
        count += 1
        if count > MOST:
            raise CheckpointError("the state dict has too many entries, or contains itself.")
        if isinstance(value, Tensor):
            yield where or "it", value
        elif isinstance(value, Mapping):
            stack.extend((_path(where, key), child) for key, child in reversed(list(value.items())))
        elif isinstance(value, (list, tuple)):
            stack.extend((_path(where, i), child) for i, child in reversed(list(enumerate(value))))
        if len(where) > 10_000:
            raise CheckpointError("the state dict is nested too deeply, or contains itself.")


def _path(where: str, key: Any) -> str:
    return str(key)[:80] if not where else f"{where}[{key!r:.80}]"


def _problem(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta" or tensor.is_nested:
        return f"is no plain tensor ({tensor.layout}, {tensor.dtype}, on {tensor.device})"
    span = sum((n - 1) * abs(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() and span < tensor.numel():
        held = tensor.untyped_storage().nbytes() // tensor.element_size()
        return f"claims the shape {tuple(tensor.shape)}, {math.prod(tensor.shape)} elements, and has memory for {held}"
    if (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
        return "has values that are NaN or infinite: the run that saved it had diverged"
    return ""


def number(value: Any) -> Any:
    """A group's entry as plain data: a 0-d tensor as the number it holds, in lists and tuples too."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if isinstance(value, (list, tuple)):
        return tuple(map(number, value))
    return value
