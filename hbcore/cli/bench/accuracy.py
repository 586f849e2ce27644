"""``--check``: is what is fast also right? Three steps against the same rule, run eagerly in float64."""

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
"""Peers that add eps to the divisor, where hbcore takes the larger: a difference of rules, which is no error of theirs."""
LARGEST = 16_000_000
"""Parameters up to which a set is checked: the reference runs one tensor at a time."""


def check(
    contenders: Iterable[tuple[Contender, Row]],
    ours: Sequence[Contender],
    shapes: Sequence[Shape],
    precision: Precision,
    device: torch.device,
    seed: int,
) -> None:
    """Set ``row.check`` of every row that is "ok"; one that raises here fails.

    Args:
        contenders: what to check, with their rows.
        ours: hbcore's contenders. Their rule is the reference, a peer's being the first of its family.
        shapes, precision, device, seed: what to step.
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
        except Exception as error:  # as in measuring
            row.fail(error)


def reference_arguments(cls: type[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The rule of ``cls(**kwargs)`` with nothing that makes it fast or small: eager, its state as wide as its parameters."""
    plain = {key: value for key, value in kwargs.items() if key not in ("compile", "storage_dtype", "compile_step")}
    wanted = plain | {"compile": "eager", "consume_grad": False}
    return {key: value for key, value in wanted.items() if key in kwargs or accepts(cls, key)}


def errors(result: Sequence[Tensor], reference: Sequence[Tensor], start: Sequence[Tensor]) -> dict[str, float]:
    """``||a - b|| / ||b||`` over all tensors together, of the parameters and of how far they moved.

    The first hides a wrong update under a large parameter; the second shows, in 16 bits, mostly how parameters are rounded.
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
