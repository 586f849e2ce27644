"""A table of rows, and sparse gradients for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

ROWS, WIDTH = 40, 5


def table(rows: int = ROWS, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype))


def sparse_gradients(
    steps: int, dtype: torch.dtype = torch.float32, rows: int = ROWS, sparse_dims: int = 1
) -> Iterator[Tensor]:
    """Gradients of some rows, or elements, in no order, some of them twice; of none at all in step 4."""
    generator = torch.Generator().manual_seed(5)
    shape = (rows, WIDTH)[:sparse_dims]
    for step in range(steps):
        count = 0 if step == 4 else 2 + step % 7
        index = torch.stack([torch.randint(n, (count,), generator=generator) for n in shape])
        index = torch.cat([index, index[:, :1]], 1)
        drawn = torch.randn(index.shape[1], *(rows, WIDTH)[sparse_dims:], generator=generator, dtype=torch.float64)
        yield torch.sparse_coo_tensor(index, drawn.to(dtype), (rows, WIDTH))


def train(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: Iterator[Tensor]) -> None:
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
