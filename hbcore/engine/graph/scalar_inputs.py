"""The numbers of a step: a group's hyperparameters, the step, and what a GradScaler adds; on the host, or on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.engine.graph.segment_spec import Recipe


class Amp(NamedTuple):
    """What torch's GradScaler hands to an optimizer that unscales by itself: 0-d tensors on the device, or None."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


NO_AMP = Amp()


def numbers(recipe: Recipe, group: Mapping[str, Any], carried: Mapping[str, float]) -> list[float]:
    """The group's present hyperparameters and what it carries, flattened as in ``recipe.scalar_names``."""
    flat: list[float] = []
    for key, n in recipe.dynamic:
        value = group[key]
        flat += [float(value)] if n is None else [float(v) for v in value]
    return [*flat, *(carried[name] for name in recipe.carried)]


def device_values(recipe: Recipe, group: Mapping[str, Any], step: Tensor, amp: Amp, model_numel: float) -> list[Tensor]:
    """The same as 0-d float64 tensors on the step counter's device, with nothing read back from it.

    A hyperparameter that is a tensor is read when the step runs, also in a replay; a number is fixed by a capture.
    """
    flat: list[Any] = []
    for key, n in recipe.dynamic:
        flat += [group[key]] if n is None else list(group[key])
    scale = 1.0 if amp.grad_scale is None else amp.grad_scale
    found = 0.0 if amp.found_inf is None else amp.found_inf
    return [_on(step.device, value) for value in (*flat, scale, found, step, model_numel)]


def _on(device: torch.device, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, torch.float64, non_blocking=True)
    return torch.full((), float(value), dtype=torch.float64, device=device)  # a fill, which a capture can hold


def capturing() -> bool:
    """Whether the current CUDA stream is recording a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
