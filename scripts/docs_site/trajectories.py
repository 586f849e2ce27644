"""The path that an optimizer takes on a function of two variables."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hbcore.registry import OptimizerSpec

STEPS = 100
STARTS = ((-1.5, 1.75), (1.25, -0.75))
"""Where the first and the second row of the parameter start."""

LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Those that are tried; the picture has the one whose last steps have the lowest value."""

LAST = 10
"""How many steps decide: a path that crosses the minimum and goes on has not arrived."""


class Path(NamedTuple):
    """What an optimizer did.

    Attributes:
        lr: its learning rate.
        points: ``[steps + 1, rows, 2]``: where each row was.
        values: the function there, ``[steps + 1, rows]``.
    """

    lr: float
    points: Tensor
    values: Tensor


def valley(points: Tensor) -> Tensor:
    """Rosenbrock's valley with milder slopes, ``(1 - x)^2 + 10 (y - x^2)^2``, of points ``[..., 2]``."""
    x, y = points.unbind(-1)
    return (1 - x).square() + 10 * (y - x.square()).square()


def rows(spec: OptimizerSpec) -> int:
    """How many points the parameter consists of: a rule for matrices gets a 2 x 2 matrix, any other a vector of two."""
    return 2 if "matrix" in spec.capabilities or "matrices" in spec.summary else 1


def walk(cls: Callable[..., Any], spec: OptimizerSpec) -> Path:
    """The best path among :data:`LEARNING_RATES`, with the class's defaults otherwise."""
    alone = bool({"modes", "closure"} & spec.capabilities)  # such rules may look at all groups at once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of advice that matters to models
        batches = [[lr] for lr in LEARNING_RATES] if alone else [list(LEARNING_RATES)]
        tried = [path for batch in batches for path in _run(cls, spec, batch)]
    return min(tried, key=_final)


def _final(path: Path) -> float:
    value = path.values[-LAST:].mean().item()
    return value if value == value else float("inf")


def _run(cls: Callable[..., Any], spec: OptimizerSpec, rates: list[float]) -> list[Path]:
    """One training for each learning rate, as groups of one optimizer."""
    start = torch.tensor(STARTS[: rows(spec)])
    if rows(spec) == 1 and "sparse" not in spec.capabilities:
        start = start[0]
    weights = [torch.nn.Parameter(start.clone()) for _ in rates]
    groups = [{"params": [(f"w{i}", w)], "lr": lr} for i, (w, lr) in enumerate(zip(weights, rates, strict=True))]
    optimizer = cls(groups)
    modes = "modes" in spec.capabilities

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([valley(w).sum() for w in weights]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if "sparse" in spec.capabilities:
            for w in weights:
                assert w.grad is not None
                w.grad = w.grad.to_sparse(1)
        return loss

    seen = [[w.detach().clone() for w in weights]]
    for _ in range(STEPS):
        if "closure" in spec.capabilities:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if modes:
            optimizer.eval()
        seen.append([w.detach().clone() for w in weights])
        if modes:
            optimizer.train()
    points = [torch.stack([now[i].reshape(-1, 2) for now in seen]) for i in range(len(rates))]
    return [Path(lr, each, valley(each)) for lr, each in zip(rates, points, strict=True)]
