"""A matrix rule around an elementwise one, and its training, for tests of ``c.apply``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hbcore.api import Domain, Optimizer, ScaleByAdam, Transform, matrix_view

SHAPES = ((5, 4), (3, 2), (5, 4), (5, 4))


def applied(self, x, s, c):
    return c.apply(self.inner, x, s)


def written(self, x, s, c):
    return self.inner.update(x, s, c)


@dataclass(frozen=True)
class Around(Transform):
    """Runs an inner rule on the doubled update, in one way or the other."""

    inner: Transform = field(default_factory=ScaleByAdam)
    how: Callable[..., Any] = applied
    others: tuple[Transform, ...] = ()
    needs: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None
    name = "around"
    domain = Domain.MATRIX

    def blocks(self, shape):
        return matrix_view(shape)

    def slots(self, param):
        return self.inner.slots(param)

    def scalars(self):
        return self.inner.scalars()

    def working_dtype(self, param):
        return self.dtype or super().working_dtype(param)

    def update(self, u, s, c):
        direction, new = self.how(self, u * 2, s, c)
        return direction + u, new


def trainer(how=applied, inner=None, dtype=torch.float32, around=None, **options):
    """An optimizer of the rule over a few parameters; ``inner`` is a rule's class, by default Adam."""

    class Toy(Optimizer):
        lr: float = 0.1
        betas: tuple[float, float] = (0.9, 0.5)

        @staticmethod
        def chain(h):
            return (Around(inner=inner() if inner else ScaleByAdam(h.betas, 1e-8), how=how, **(around or {})),)

    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]
    return Toy(params, **options), params


def train(optimizer, params, steps=6, partial=True, schedule=True, without=()):
    for k in range(steps):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * k + i), dtype=torch.float64)
            p.grad = None if i in without or (partial and k in (2, 3) and i == 2) else grad.to(p.dtype)
        for group in optimizer.param_groups if schedule else ():
            group["betas"] = 0.9, 0.5 + 0.05 * k
        optimizer.step()
    return optimizer, params


def kept(optimizer, params):
    """Parameters and slots, decoded or not."""
    return [t for p in params for t in (p.detach(), *(v for n, v in sorted(optimizer.state[p].items()) if n != "step"))]
