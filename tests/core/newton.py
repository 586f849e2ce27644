"""A rule that only keeps the Hessian-vector products that it is given, models, and the closures of their training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hbcore.api import Curvature, Domain, Optimizer, Transform, matrix_view, zeros


@dataclass(frozen=True)
class Keep(Transform):
    """Stores the last product, its vector, and the parameter as it found it; the update stays what it is."""

    interval: int = 1
    finite_differences: bool = False
    fallback: bool = True
    every: int = 1
    name = "keep"
    domain = Domain.MATRIX
    needs = frozenset({"hvp", "param"})

    @property
    def curvature(self):
        return Curvature(self.interval, self.finite_differences, self.fallback)

    def rate(self, k):
        return 1 / self.every

    def blocks(self, shape):
        return matrix_view(shape)

    def slots(self, param):
        return {name: zeros(param) for name in ("product", "vector", "found")}

    def update(self, u, s, c):
        assert (c.hvp is None) == (c.vector is None)
        assert c.refresh or c.hvp is None
        pair = {} if c.hvp is None else {"product": c.hvp, "vector": c.vector}
        return u, {"found": c.param, **pair}


@dataclass(frozen=True)
class KeepAgain(Keep):
    """The same for a second rule in a chain."""

    name = "again"

    def slots(self, param):
        return {f"again.{name}": slot for name, slot in super().slots(param).items()}

    def update(self, u, s, c):
        u, new = super().update(u, s, c)
        return u, {f"again.{name}": value for name, value in new.items()}


class Keeping(Optimizer):
    """Gradient descent that keeps products; no decay, no momentum."""

    lr: float = 0.1
    interval: int = 1
    finite_differences: bool = False
    fallback: bool = True
    every: int = 1

    @staticmethod
    def chain(h):
        return (Keep(h.interval, h.finite_differences, h.fallback, h.every),)


def network(dtype=torch.float32, dropout=0.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)


def batch(seed=0, dtype=torch.float32):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_of(model, seed=0):
    return model(batch(seed, next(model.parameters()).dtype)).square().mean()


def closure_of(model, optimizer, seed=0, calls=None):
    """What users write."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, seed)
        loss.backward()
        if calls is not None:
            calls.append(loss)
        return loss

    return closure


def trainer(dtype=torch.float32, dropout=0.0, **options):
    model = network(dtype, dropout)
    return model, Keeping(model.named_parameters(), **options)


def kept(optimizer, model, name):
    """One slot of every parameter, in float64."""
    return [optimizer.state[p][name].double() for p in model.parameters()]


def derivatives(loss, params, vectors):
    """Gradient, H v and the third derivative along v twice, by differentiating three times."""
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    product = torch.autograd.grad(gradient, params, vectors, create_graph=True)
    third = torch.autograd.grad(product, params, vectors, allow_unused=True)
    return [[t.detach() for t in some] for some in (gradient, product, third)]
