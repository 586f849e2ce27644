"""Fifteen of LightBench's problems in sizes that take seconds on a CPU; see README.md.

What each problem minimises, where it starts and what makes its levels harder are LightBench's
(https://github.com/HomebrewML/LightBench); sizes, steps and most thresholds are those of a smaller budget. A problem is solved
once its error is at its threshold or below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from torch.nn import functional

SIZE = 64
"""Elements of a problem that is one vector: PSGD's factor of a vector is square."""

ONE_LEVEL = {"easy": 0.0}
"""For problems that LightBench has in one difficulty."""


@dataclass(frozen=True)
class Instance:
    """A problem at one level and from one start.

    ``loss(t, generator)`` is what step ``t`` (from 0) differentiates; noise is drawn from the generator.
    ``error(t)`` is what has to reach the threshold, without noise.
    """

    params: list[Tensor]
    loss: Callable[[int, Generator], Tensor]
    error: Callable[[int], Tensor]


@dataclass(frozen=True)
class Problem:
    """How to begin, and when it is solved: ``make(level, generator)``, where ``level`` is one of the values of ``levels``."""

    make: Callable[[float, Generator], Instance]
    threshold: float
    steps: int = 300
    levels: Mapping[str, float] = field(default_factory=lambda: ONE_LEVEL)


def _deterministic(start: Tensor, objective: Callable[[Tensor, int], Tensor]) -> Instance:
    """One parameter, whose loss is its error: no noise.

    A vector is in float64: in float32 some problems have no gradient far from their minimum. Matrices are not, because
    HeavyBall's methods for them are for float32.
    """
    param = (start.double() if start.ndim == 1 else start).requires_grad_()
    return Instance([param], lambda t, generator: objective(param, t), lambda t: objective(param, t))


def _distance(param: Tensor, target: Tensor | float) -> Tensor:
    """Root mean square, over the elements."""
    return (param - target).square().mean().sqrt()


def beale(level: float, generator: Generator) -> Instance:
    """Beale's function, moved so that its minimum is at the origin; from far away on a steep slope."""

    def objective(param: Tensor, t: int) -> Tensor:
        x, y = param[0] + 3, param[1] + 0.5
        terms = [(c - x + x * y**k) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))]
        return torch.stack(terms).sum()

    return _deterministic(torch.tensor([-7.0, -4.0]), objective)


def rosenbrock(level: float, generator: Generator) -> Instance:
    """Rosenbrock's valley with equal weights."""
    return _deterministic(torch.tensor([-7.0, -4.0]), lambda p, t: (1 - p[0]) ** 2 + (p[1] - p[0] ** 2) ** 2)


def rastrigin(level: float, generator: Generator) -> Instance:
    """A paraboloid under cosines: two local minima lie between the start and the global one."""

    def objective(param: Tensor, t: int) -> Tensor:
        return (param**2 + 10 * (1 - torch.cos(2 * math.pi * param))).mean()

    return _deterministic(torch.tensor([-2.2, -2.2]), objective)


def saddle_point(level: float, generator: Generator) -> Instance:
    """An odd power, whose gradient vanishes at 0 with the values below it on the other side; solved at a sum of -9.9."""
    return _deterministic(torch.tensor([1.2, 1.9]), lambda p, t: p.pow(2 * int(level) + 1).sum() + 10)


def plateau_navigation(level: float, generator: Generator) -> Instance:
    """A disc-shaped well with a flat surrounding, where the gradients are tiny; the levels make the edge sharper."""
    bottom = 1 / (1 + math.exp(level))
    return _deterministic(torch.tensor([1.5, 1.5]), lambda p, t: torch.sigmoid((p.square().sum() - 1) * level) - bottom)


def discontinuous_gradient(level: float, generator: Generator) -> Instance:
    """A parabola on the left of the minimum and a line on its right, where the gradient jumps."""
    param = torch.randn(SIZE, generator=generator).requires_grad_()
    return Instance(
        [param], lambda t, generator: torch.where(param < 0, param**2, 2 * param).mean(), lambda t: _distance(param, 0.0)
    )


def quadratic_varying_scale(level: float, generator: Generator) -> Instance:
    """Curvatures from 1 to the number of elements, normalised to a sum of 1."""
    size = int(level)
    param = torch.randn(size, generator=generator).requires_grad_()
    scale = functional.normalize(torch.arange(1.0, size + 1), p=1, dim=0)
    return Instance([param], lambda t, generator: param.square() @ scale, lambda t: _distance(param, 0.0))


def sparse_gradient(level: float, generator: Generator) -> Instance:
    """Of all elements a random share has a gradient, for two steps in a row. The error is that of all elements."""
    param, before = torch.randn(256, generator=generator).requires_grad_(), [torch.zeros(256, dtype=torch.bool)]

    def loss(t: int, generator: Generator) -> Tensor:
        now = torch.rand(256, generator=generator) < level
        seen, before[0] = now | before[0], now
        return (param * seen).square().mean()

    return Instance([param], loss, lambda t: param.square().mean())


def scale_invariant(level: float, generator: Generator) -> Instance:
    """log(1 + x^2) with starts of very different sizes, whose gradients shrink with the distance."""
    start = torch.logspace(-level, level, SIZE) * torch.randn(SIZE, generator=generator)
    return _deterministic(start, lambda p, t: torch.log1p(p.square()).mean())


def momentum_utilization(level: float, generator: Generator) -> Instance:
    """A parabola with waves on it that rise and fall with time; the levels make them higher."""

    def objective(param: Tensor, t: int) -> Tensor:
        return (param.square() + level * math.cos(0.1 * (t + 1)) * torch.sin(10 * param)).mean()

    return _deterministic(torch.randn(SIZE, generator=generator), objective)


def adversarial_gradient(level: float, generator: Generator) -> Instance:
    """A parabola with a common push, whose sign oscillates: slowly at the easy level, fast at the hard one."""
    param = torch.randn(SIZE, generator=generator).requires_grad_()

    def loss(t: int, generator: Generator) -> Tensor:
        return param.square().mean() + math.sin((t + 1) * math.pi * 1.1 / level) * param.mean()

    return Instance([param], loss, lambda t: _distance(param, 0.0))


def dynamic_landscape(level: float, generator: Generator) -> Instance:
    """A target that moves along a sine, a period in ``2 pi level / 1.1`` steps."""
    places = torch.linspace(0, 2 * math.pi, SIZE, dtype=torch.float64)

    def objective(param: Tensor, t: int) -> Tensor:
        return (param - torch.sin(places + (t + 1) * 1.1 / level)).square().mean()

    return _deterministic(torch.randn(SIZE, generator=generator), objective)


def powers(level: float, generator: Generator) -> Instance:
    """Row k of a matrix is raised to the power 2k: the higher ones are flat around their minimum and steep far from it."""
    rows = int(level)
    exponents = 2 * torch.arange(1, rows + 1)[:, None]
    return _deterministic(torch.rand(rows, 16, generator=generator) * 2, lambda p, t: (p - 1).abs().pow(exponents).mean())


def wide_linear(level: float, generator: Generator) -> Instance:
    """One square matrix learns the cumulative sum from batches of 16; its error is its distance from the triangle of ones."""
    size = int(level)
    param = torch.randn(size, size, generator=generator).requires_grad_()
    target = torch.ones(size, size).triu()

    def loss(t: int, generator: Generator) -> Tensor:
        inputs = torch.randn(16, size, generator=generator)
        return (inputs @ param - inputs.cumsum(1)).square().mean()

    return Instance([param], loss, lambda t: _distance(param, target))


def xor_digit_rnn(level: float, generator: Generator) -> Instance:
    """A recurrent network learns the parity of so many bits; its error is the loss on 256 sequences of its own."""
    length, width = int(level), 16
    shapes = {"embed": (2, width), "inward": (width, width), "across": (width, width), "bias": (width,), "head": (width, 1)}
    p = {name: (torch.randn(*shape, generator=generator) / math.sqrt(width)).requires_grad_() for name, shape in shapes.items()}

    def entropy(bits: Tensor) -> Tensor:
        inward, state = p["embed"] @ p["inward"] + p["bias"], torch.zeros(len(bits), width)
        for k in range(length):
            state = torch.tanh(inward[bits[:, k]] + state @ p["across"])
        logits = functional.layer_norm(state, (width,)) @ p["head"]
        return functional.binary_cross_entropy_with_logits(logits[:, 0], (bits.sum(1) % 2).float())

    held_out = torch.randint(2, (256, length), generator=generator)
    return Instance(
        list(p.values()),
        lambda t, generator: entropy(torch.randint(2, (64, length), generator=generator)),
        lambda t: entropy(held_out),
    )


def _levels(easy: float, medium: float, hard: float) -> dict[str, float]:
    return {"easy": easy, "medium": medium, "hard": hard}


PROBLEMS: dict[str, Problem] = {
    "beale": Problem(beale, 1e-6),
    "rosenbrock": Problem(rosenbrock, 1e-6),
    "rastrigin": Problem(rastrigin, 1e-2),
    "saddle_point": Problem(saddle_point, 0.1, levels=_levels(2, 4, 8)),
    "plateau_navigation": Problem(plateau_navigation, 1e-4, levels=_levels(1, 4, 8)),
    "discontinuous_gradient": Problem(discontinuous_gradient, 5e-2),
    "quadratic_varying_scale": Problem(quadratic_varying_scale, 1e-6, levels=_levels(4, 16, 512)),
    "sparse_gradient": Problem(sparse_gradient, 1e-3, levels=_levels(2**-1, 2**-3, 2**-6)),
    "scale_invariant": Problem(scale_invariant, 1e-3, levels=_levels(1, 2, 3)),
    "momentum_utilization": Problem(momentum_utilization, 1e-6, levels=_levels(0.02, 0.1, 0.5)),
    "adversarial_gradient": Problem(adversarial_gradient, 1e-2, levels=_levels(100, 10, 7)),
    "dynamic_landscape": Problem(dynamic_landscape, 1e-2, levels=_levels(100, 20, 10)),
    "powers": Problem(powers, 1e-6, levels=_levels(8, 16, 32)),
    "wide_linear": Problem(wide_linear, 3e-3, levels=_levels(4, 16, 32)),
    "xor_digit_rnn": Problem(xor_digit_rnn, 1e-2, levels=_levels(2, 4, 8)),
}
