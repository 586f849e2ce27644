"""``--check``: compares three steps with the same rule, run eagerly in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hbcore.cli.bench.contenders import Contender, Precision, accepts
from hbcore.cli.bench.measure import Noise
from hbcore.cli.bench.record import Row
from hbcore.cli.bench.shapes import Shape

STEPS = 3
ADD_EPS = ("torch", "flashoptim")
"""Peers that add eps to the divisor, where hbcore takes the maximum. The rules differ; it is not an error of the peers."""
LARGEST = 16_000_000
"""Largest number of parameters in a checked set: the reference runs one tensor at a time, slowly."""


def check(
    contenders: Iterable[tuple[Contender, Row]],
    ours: Sequence[Contender],
    shapes: Sequence[Shape],
    precision: Precision,
    device: torch.device,
    seed: int,
) -> None:
    """Set ``row.check`` of every row with status "ok"; a contender that raises here fails.

    Args:
        contenders: the contenders to check, with their rows.
        ours: hbcore's contenders, which serve as the reference; for a peer, the first one of its family.
        shapes, precision, device, seed: determine parameters and gradients.
    """
    noise = Noise(shapes, getattr(torch, precision.param), device, seed)
    known: dict[str, list[Tensor]] = {}
    for contender, row in contenders:
        if row.status != "ok":
            continue
        try:
            one = contender if contender.source == "hbcore" else next(c for c in ours if c.family == contender.family)
            cls = one.load()
            kwargs = reference_arguments(cls, one.kwargs)
            if contender.source in ADD_EPS and accepts(cls, "division_backend"):
                kwargs["division_backend"] = "eps_add"
            key = f"{one.target} {kwargs}"
            if key not in known:
                known[key] = _run(cls, kwargs, noise, torch.float64)
            cls = contender.load()
            result = _run(cls, contender.arguments(cls, precision), noise, noise.params[0].dtype)
            row.check = errors(result, known[key], noise.params)
        except Exception as error:  # as while measuring
            row.fail(error)


def reference_arguments(cls: type[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``cls(**kwargs)`` for the reference: eager, with state in the parameters' dtype."""
    plain = {key: value for key, value in kwargs.items() if key not in ("compile", "storage_dtype", "compile_step")}
    wanted = plain | {"compile": "eager", "consume_grad": False}
    return {key: value for key, value in wanted.items() if key in kwargs or accepts(cls, key)}


def errors(result: Sequence[Tensor], reference: Sequence[Tensor], start: Sequence[Tensor]) -> dict[str, float]:
    """``||a - b|| / ||b||`` over all tensors together, for the parameters and for their displacement.

    The first hides a wrong update of a large parameter; the second, in 16 bits, mostly shows the rounding of parameters.
    """
    difference = _norm(a.double() - b for a, b in zip(result, reference, strict=True))
    moved = _norm(b - p.double() for b, p in zip(reference, start, strict=True))
    return {"parameters": _ratio(difference, _norm(reference)), "displacement": _ratio(difference, moved)}


def _ratio(difference: float, norm: float) -> float:
    return difference / norm if norm else float("inf") if difference else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(t.square().sum().item() for t in tensors))


def _run(cls: type[Any], kwargs: Mapping[str, Any], noise: Noise, dtype: torch.dtype) -> list[Tensor]:
    """The parameters after :data:`STEPS` steps, alternating between the two sets of gradients."""
    params = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in noise.params]
    optimizer = cls(params, **kwargs)
    for step in range(STEPS):
        for p, grad in zip(params, noise.grads[step % 2], strict=True):
            p.grad = grad.to(dtype)
        optimizer.step()
    return [p.detach() for p in params]
