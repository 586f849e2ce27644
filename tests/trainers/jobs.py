"""What runs on several processes."""

from __future__ import annotations

import os
from unittest import mock

import torch
from torch import nn

import hbcore


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count: int, rows: int = 8):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        x = torch.randn(rows, 6, generator=generator)
        yield x, x[:, :3].sin()


def accelerated(rank, world, name, options, steps=4):
    """A model's weights after steps under Accelerate, each rank with its rows of each batch."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "true"}
    with mock.patch.dict(os.environ, environment if world > 1 else {}):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            accelerator = Accelerator(cpu=True)
            assert accelerator.num_processes == world
            model = net()
            model, optimizer = accelerator.prepare(model, hbcore.create(name, model, **options))
            for x, y in batches(steps):
                mine = slice(rank, None, world)
                accelerator.backward((model(x[mine]) - y[mine]).square().mean())
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            return [p.detach() for p in accelerator.unwrap_model(model).parameters()]
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
