"""Scalar inputs of a step: a group's hyperparameters, the step, a GradScaler's scale; on the host or the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.errors import HyperparameterError


class Amp(NamedTuple):
    """Values that torch's GradScaler passes to optimizers that unscale themselves: 0-d tensors on the device, or None."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


NO_AMP = Amp()


def numbers(spec: SegmentSpec, group: Mapping[str, Any], carried: Mapping[str, float]) -> list[float]:
    """The group's current hyperparameters and carried numbers, flattened as in ``spec.scalar_names``."""
    flat: list[float] = []
    for key, n in spec.dynamic:
        value = group[key]
        if n is not None:
            for v in value:
                flat.append(v if v.__class__ is float else _number(key, v))
        elif value.__class__ is float:
            flat.append(value)
        else:
            flat.append(float(value) if value.__class__ is int else _number(key, value))
    for name in spec.carried:
        flat.append(carried[name])
    return flat


def _number(key: str, value: Any) -> float:
    """A hyperparameter as a number; text, which ``float`` would take, is an oversight that no checkpoint would load."""
    if value.__class__ in (str, bytes):
        raise HyperparameterError(f"{key}={value!r} in a param group is a {type(value).__name__}; write a number there.")
    return float(value)


def device_values(spec: SegmentSpec, group: Mapping[str, Any], step: Tensor, amp: Amp, model_numel: float) -> list[Tensor]:
    """The same as 0-d float64 tensors on the step counter's device, without synchronizing.

    A tensor hyperparameter is read when the step runs, including in replays; a number is fixed at capture.
    """
    flat: list[Any] = []
    for key, n in spec.dynamic:
        flat += [group[key]] if n is None else list(group[key])
    scale = 1.0 if amp.grad_scale is None else amp.grad_scale
    found = 0.0 if amp.found_inf is None else amp.found_inf
    return [_on(step.device, value) for value in (*flat, scale, found, step, model_numel)]


def _on(device: torch.device, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, torch.float64, non_blocking=True)
    return torch.full((), float(value), dtype=torch.float64, device=device)  # a fill, which can be captured


def capturing() -> bool:
    """Whether the current CUDA stream is recording a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
