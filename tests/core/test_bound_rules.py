"""A matrix rule is built once and follows its hyperparameters all the same, also where its chain computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core.kit import gradients, parameters

from hb_soap import SOAP
from hbcore.api import Domain, Optimizer, Transform, hyper, matrix_view

SHAPES = ((3, 2), (4, 4))
built: list[Any] = []


@dataclass(frozen=True)
class Scaled(Transform):
    factor: float = hyper(1.0)
    pair: tuple[float, float] = hyper((1.0, 1.0))
    name = "scaled"
    domain = Domain.MATRIX

    def __post_init__(self):
        super().__post_init__()
        built.append(self.factor)

    def blocks(self, shape):
        return matrix_view(shape)

    def update(self, u, s, c):
        return u * (self.factor * self.pair[1]), {}


class Plain(Optimizer):
    lr: float = 1.0
    factor: float = 1.0
    pair: tuple[float, float] = (1.0, 1.0)

    @staticmethod
    def chain(h):
        return (Scaled(h.factor, h.pair),)


class Computed(Plain):
    @staticmethod
    def chain(h):
        return (Scaled(h.factor * 0.5, (h.pair[0], h.pair[1] + 1)),)


def moved(cls, steps):
    """How far each step moves the parameters for gradients of ones, while a schedule writes new numbers."""
    params = parameters(SHAPES, torch.float64)
    optimizer, seen = cls(params, compile="eager"), []
    for t in range(1, steps + 1):
        optimizer.param_groups[0].update(factor=float(t), pair=(0.0, 2.0 * t))
        before = params[0].detach().clone()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append(float((before - params[0]).mean()))
    return seen


def test_a_rule_follows_its_hyperparameters():
    assert moved(Plain, 5) == pytest.approx([t * 2 * t for t in range(1, 6)])


def test_a_chain_that_computes_with_them_is_built_in_every_step():
    assert moved(Computed, 5) == pytest.approx([0.5 * t * (2 * t + 1) for t in range(1, 6)])


def test_a_chain_that_only_hands_them_on_is_built_once():
    counts = []
    for steps in (3, 8):
        built.clear()
        moved(Plain, steps)
        counts.append(len(built))
    assert counts[0] == counts[1]


def test_the_rising_decay_is_a_function_of_the_step_that_is_being_taken():
    """Bound once, it must not keep the first step's value: a matrix rule with palm equals one that is planned anew."""
    reached = []
    for fresh in (False, True):
        params = parameters(((6, 4),), torch.float64)
        optimizer = SOAP(params, palm=True, compile="eager")
        for grads in gradients(6, ((6, 4),), torch.float64):
            params[0].grad = grads[0]
            if fresh:
                optimizer.core.invalidate()
            optimizer.step()
        reached.append(params[0].detach())
    assert torch.equal(*reached)
