"""Distance over gradients: rules with scalar slots, for each tensor alone and for the whole model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hbcore.api import Domain, Optimizer, Transform, hyper, scalar, zeros


@dataclass(frozen=True)
class Dog(Transform):
    r"""Distance over gradients, Ivgi, Hinder and Carmon 2023 (arXiv:2302.12022), for each tensor alone: L-DoG, Section 3.3.

    .. math::
        \bar r_t = \max(\bar r_{t-1}, \|x_t - x_0\|) \qquad G_t = G_{t-1} + \|g_t\|^2 \qquad
        u_t = g_t \bar r_t / \sqrt{G_t + \epsilon}
    """

    first: float = hyper(1e-2, gt=0)
    name = "dog"
    domain = Domain.TENSOR

    def slots(self, param):
        return {"start": zeros(param), "moved": scalar(), "squares": scalar(1e-8)}

    def update(self, u, s, c):
        start = torch.where(c.step == 1, c.param, s["start"])
        first = self.first * (1 + torch.where(c.step == 1, c.norm(c.param), 0.0))
        moved = torch.maximum(torch.where(c.step == 1, first, s["moved"]), c.norm(c.param - start))
        squares = s["squares"] + c.sum(u * u)
        return u * (moved / squares.sqrt()), {"start": start, "moved": moved, "squares": squares}


@dataclass(frozen=True)
class ModelDog(Dog):
    """The same over the whole model."""

    name = "model_dog"
    domain = Domain.MODEL


class LDoG(Optimizer):
    lr: float = 1.0
    first: float = 1e-2

    @staticmethod
    def chain(h):
        return (Dog(h.first),)


class DoG(Optimizer):
    lr: float = 1.0
    first: float = 1e-2

    @staticmethod
    def chain(h):
        return (ModelDog(h.first),)
