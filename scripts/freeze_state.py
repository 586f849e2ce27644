"""Freeze a small checkpoint of each optimizer, and where three more steps lead, for later versions to load.

    python scripts/freeze_state.py NAME...      writes tests/fixtures/state/NAME-v1.pt

A fixture is written once, when a rule's version is released, and never again: ``tests/core/test_state.py`` loads them all.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import hbcore

FOLDER = Path(__file__).parent.parent / "tests" / "fixtures" / "state"
SHAPES = ((6, 6), (5, 6), (7, 2, 2, 2), (4,), ())
OPTIONS = {name: {"ns_dtype": "float32"} for name in ("Muon", "MuonAdamW")}


def parameters() -> list[nn.Parameter]:
    """The parameters that the fixtures start from."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]


def steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], which: range) -> None:
    """Steps with gradients of fixed seeds."""
    for step in which:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def values(params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in params]


def freeze(name: str) -> None:
    """Write one fixture."""
    params = parameters()
    optimizer = hbcore.get(name)(params, lr=0.01, compile="eager", **OPTIONS.get(name, {}))
    steps(optimizer, params, range(1, 6))
    fixture = {"params": values(params), "optimizer": copy.deepcopy(optimizer.state_dict())}
    steps(optimizer, params, range(6, 9))
    torch.save({**fixture, "after": values(params)}, FOLDER / f"{name}-v1.pt")


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for optimizer_name in sys.argv[1:]:
        freeze(optimizer_name)
