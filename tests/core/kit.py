"""What several of these tests need: models, gradients and one measure of distance."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hbcore import SplitOpt
from hbcore.api import Optimizer, Transform

SHAPES = ((5, 7), (13,), (2, 3, 4), (1,), ())


def combined(*axes: Iterable[Any], compiled: Sequence[tuple[Any, ...]] = ()) -> list[Any]:
    """Every combination of the axes' values, for ``pytest.mark.parametrize``.

    Inductor takes seconds to compile a graph. Of its combinations only those in ``compiled`` run in ``make test``, and the
    others in ``make test-full``. Every shape of phases is among the former somewhere: no reduction, one over a tensor, one over
    the model, several.
    """
    marks = {True: (), False: (pytest.mark.full,)}
    return [pytest.param(*c, marks=marks["inductor" not in c or c in compiled]) for c in itertools.product(*axes)]


KINDS = ("AdamW", "SFAdamW", "MSAMLaProp", "Adafactor", "Muon", "MuonAdamW", "SOAP", "PSGDKron")
"""Optimizers of each kind of rule."""


def one_of_each(names: Iterable[str]) -> list[Any]:
    """Names of optimizers, for ``pytest.mark.parametrize``: in ``make test``, those of :data:`KINDS`."""
    return [pytest.param(name, marks=() if name in KINDS else pytest.mark.broad) for name in names]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers, drawn in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3)).to(dtype)


def split(model: nn.Module) -> SplitOpt:
    """Muon for a model's matrices, schedule-free AdamW for the rest."""
    specs = [{"optimizer": "Muon", "when": lambda p: p.ndim > 1}, {"optimizer": "SFAdamW"}]
    return SplitOpt(model.named_parameters(), specs, lr=0.01)


def convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 4 * 4, 3)
    )


def batch_for(model: nn.Module, seed: int) -> Tensor:
    """A batch of eight inputs in the model's dtype."""
    first = next(model.parameters())
    shape = (8, 2, 8, 8) if first.ndim == 4 else (8, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(first.dtype)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x = batch_for(model, seed)
    return (model(x) - x.flatten(1)[:, :3]).square().mean()


def backward(model: nn.Module, seed: int) -> Tensor:
    model.zero_grad()
    loss = loss_of(model, seed)
    loss.backward()
    return loss


def copy_gradients(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    """Give ``target`` the gradients of ``source``, so that rounding cannot make two trainings drift apart."""
    for a, b in zip(source, target, strict=True):
        b.grad = None if a.grad is None else a.grad.detach().clone().to(b.dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Ordinary training; each step's number seeds its batch."""
    for step in steps:
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(
    steps: int, shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> Iterator[list[Tensor]]:
    """Random gradients of a size that varies between steps; some elements are zero, and one step's are all zero."""
    generator = torch.Generator().manual_seed(2)
    for step in range(steps):
        drawn = [torch.randn(s, generator=generator, dtype=torch.float64) * 2.0 ** (step % 5 - 2) for s in shapes]
        yield [torch.where(g.abs() < 0.1, 0.0, g * (step != 3)).to(dtype) for g in drawn]


def run(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], steps: Iterable[Sequence[Tensor]]) -> None:
    """Step once for each list of gradients."""
    for grads in steps:
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def resumes(
    build: Callable[[Sequence[Tensor]], Any], start: Callable[[], list[Any]], train: Callable[..., None], steps: int
) -> None:
    """Check that a run that is saved and resumed after any of its steps ends bit for bit as one that goes straight on.

    Args:
        build: makes an optimizer of parameters.
        start: makes the parameters.
        train: ``train(optimizer, params, range)`` takes the steps of the range.
    """
    straight = start()
    train(build(straight), straight, range(steps))
    for halt in range(1, steps):
        params = start()
        first = build(params)
        train(first, params, range(halt))
        saved = copy.deepcopy(first.state_dict())
        second = build(params)
        second.load_state_dict(saved)
        train(second, params, range(halt, steps))
        assert same(params, straight), f"halted after step {halt}"


def distance(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest, over the tensors, of the norm of the difference relative to the norm; infinite if anything is NaN."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.detach().double(), b.detach().double()
        relative = float((a - b).norm() / b.norm().clamp(min=1e-30))
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def values(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def optimizer_of(*rules: Callable[..., Transform]) -> type[Optimizer]:
    """An optimizer class whose chain is ``rules``, with every hyperparameter of theirs in its param groups."""
    hypers = [{name: value for name, value, _ in rule().hypers()} for rule in rules]

    class Toy(Optimizer):
        def __init__(self, params, lr=0.1, **options):
            numbers = {name: value for own in hypers for name, value in own.items()}
            super().__init__(params, {"lr": lr, **numbers}, options)

        @staticmethod
        def chain(h):
            return tuple(rule(**{name: getattr(h, name) for name in own}) for rule, own in zip(rules, hypers, strict=True))

    return Toy
