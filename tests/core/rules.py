"""Rules made in one line, for tests of what rules may do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hbcore.api import Domain, Optimizer, Transform, hyper, matrix_view, zeros


def moment(self, param):
    return {"m": zeros(param)}


def kept(self, u, s, c):
    """A rule that does nothing."""
    return u, {"m": s["m"]}


def rule(update=kept, slots=moment, **attributes):
    """A rule's class."""
    own = {"__annotations__": {"beta": float}, "beta": hyper(0.5, ge=0, le=1), "name": "toy", "update": update, "slots": slots}
    return dataclass(frozen=True)(type("ToyRule", (Transform,), {**own, **attributes}))


def matrix(update=kept, slots=moment, **attributes):
    """The class of a matrix rule."""
    return rule(update, slots, **{"domain": Domain.MATRIX, "blocks": lambda self, shape: matrix_view(shape), **attributes})


def optimizer_with(chain):
    """An optimizer whose ``chain`` is a function of the group's entries ``lr`` and ``beta``."""

    class Toy(Optimizer):
        lr: float = 0.1
        beta: float = 0.5

    Toy.chain = staticmethod(chain)
    return Toy


def stepped(made, *params, steps=2, **options):
    """An optimizer of one rule, after steps with gradients of ones."""
    optimizer = optimizer_with(lambda h: (made(h.beta),))(params, **options)
    for _ in range(steps):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


def parameter(*shape):
    return torch.nn.Parameter(torch.ones(shape))
