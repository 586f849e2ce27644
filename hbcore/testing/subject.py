"""The optimizer under test, its models, and their gradients."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

NOT_BY_HAND = frozenset({"closure", "sparse"})
"""Capabilities of optimizers that a check cannot step with gradients that it assigns itself."""


@dataclass(frozen=True)
class Check:
    """A property that users expect from optimizers.

    Args:
        function: raises AssertionError, with a message for the optimizer's author, if the property does not hold, and
            ``unittest.SkipTest`` if it cannot be checked on this machine.
        needs: the check applies only to optimizers that declare all of these capabilities.
        excludes: the check does not apply to optimizers that declare any of these.
        stored: whether a codec can be at fault: by default, compressed state is checked for these properties only.
        compiles: whether it trains with ``compile="inductor"``. By default the graphs then run as they are: compiling takes
            most of the time, and is the engine's to get right.
    """

    function: Callable[..., None]
    needs: frozenset[str] = frozenset()
    excludes: frozenset[str] = frozenset()
    stored: bool = False
    compiles: bool = False

    @property
    def name(self) -> str:
        """The function's name, which states the property."""
        return self.function.__name__

    def run(self, subject: Any, *ranked: Any, compiled: bool = False) -> None:
        """Check one optimizer, or codec; ``ranked`` is what checks of several processes take besides it."""
        with nullcontext() if compiled or not self.compiles else patch.object(torch, "compile", lambda graph, **_: graph):
            self.function(subject, *ranked)

    def applies(self, capabilities: frozenset[str]) -> bool:
        """Whether the check applies to an optimizer with these capabilities."""
        return self.needs <= capabilities and not self.excludes & capabilities


@dataclass(frozen=True)
class Subject:
    """An optimizer class with its capabilities, and the options to test it with.

    Args:
        cls: a subclass of :class:`hbcore.api.Optimizer`.
        capabilities: a subset of :data:`hbcore.registry.spec.CAPABILITIES`.
        options: keyword arguments for every optimizer that is built.
    """

    cls: type[Any]
    capabilities: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"

    def optimizer(self, params: Any, **options: Any) -> Any:
        """A new optimizer; ``options`` extend the subject's own."""
        return self.cls(params, **{**self.options, **options})

    def trial(self, model: nn.Module, **options: Any) -> Trial:
        """A new optimizer for a model's named parameters."""
        return Trial(self, model, self.optimizer(list(model.named_parameters()), **options))

    def mlp(self, dtype: torch.dtype = torch.float32, **options: Any) -> Trial:
        """A small perceptron with a LayerNorm, and its optimizer."""
        return self.trial(mlp(dtype), **options)

    def convnet(self, **options: Any) -> Trial:
        """A small convolutional network, and its optimizer."""
        return self.trial(convnet(), **options)

    def loose(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> Trial:
        """Independent parameters ``p0``, ``p1``, ... of these shapes, and their optimizer."""
        return self.trial(Loose(shapes, dtype), **options)


@dataclass
class Trial:
    """A model, its optimizer, and the number of steps taken so far, which determines the next batch."""

    subject: Subject
    model: nn.Module
    optimizer: Any
    taken: int = 0

    def train(self, steps: int) -> None:
        """Take steps on the model's own loss."""
        for _ in range(steps):
            self.step()

    def step(self, loss: Callable[[], Tensor] | None = None) -> None:
        """Take one step on ``loss()``, by default the model's own; then clear the gradients."""
        if "closure" in self.subject.capabilities:
            self.optimizer.step(partial(self.backward, loss))
        else:
            self.backward(loss)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.taken += 1

    def backward(self, loss: Callable[[], Tensor] | None = None) -> Tensor:
        """Replace the gradients with those of ``loss()``, by default the model's own loss for the coming step."""
        self.optimizer.zero_grad()
        with torch.enable_grad():
            value = loss_of(self.model, self.taken) if loss is None else loss()
            value.backward()  # type: ignore[no-untyped-call]
        if "sparse" in self.subject.capabilities:
            for p in self.params.values():
                p.grad = None if p.grad is None else p.grad.to_sparse(min(p.ndim, 1))
        return value

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return dict(self.model.named_parameters())

    def values(self) -> dict[str, Tensor]:
        """Copies of the parameters, by name."""
        return {name: p.detach().clone() for name, p in self.params.items()}

    def state(self) -> dict[str, Any]:
        """Copies of the entries of the state dict, named like ``"exp_avg of 0.weight"``."""
        saved = self.optimizer.state_dict()
        named = [(g["params"], g.get("param_names", ())) for g in saved["param_groups"]]
        names = {key: name for keys, given in named for key, name in zip(keys, given, strict=False)}
        return {
            f"{slot} of {names.get(key, key)}": value.clone() if isinstance(value, Tensor) else value
            for key, slots in saved["state"].items()
            for slot, value in slots.items()
        }

    def numbers(self) -> list[dict[str, Any]]:
        """The saved param groups, without their parameters."""
        return [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.state_dict()["param_groups"]]


class Loose(nn.Module):
    """Independent parameters."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(drawn(f"start {i}", shape).to(dtype)))


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Six inputs, sixteen hidden units, three outputs; always the same weights."""
    return _seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))).to(dtype)


def convnet() -> nn.Module:
    """Two convolutions and a linear layer; always the same weights."""
    return _seeded(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 4 * 4, 3))
    )


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The model's loss on the batch of a step."""
    first = next(model.parameters())
    if isinstance(model, Loose):
        return pull(dict(model.named_parameters()), step)
    x = drawn(f"batch {step}", (8, 2, 8, 8) if first.ndim == 4 else (8, 6)).to(first.dtype)
    return (model(x) - x.flatten(1)[:, :3]).square().mean()  # type: ignore[no-any-return]


def pull(params: Mapping[str, Tensor], step: int) -> Tensor:
    """Half the squared distance to targets that change with each step; gives a gradient for any shape."""
    losses = [0.5 * (p - drawn(f"{name} {step}", p.shape).to(p.dtype)).square().sum() for name, p in params.items()]
    return torch.stack(losses).sum()


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, determined by ``name``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def through_file(content: Any) -> Any:
    """Save ``content`` to a checkpoint file and load it like an untrusted one."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, map_location="cpu", weights_only=True)


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()
