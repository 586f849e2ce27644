"""One run: a byte-level GPT, its held-out loss along the way, and the time of a step."""

from __future__ import annotations

import math
import sysconfig
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import Trial
from torch import Tensor

import hbcore
from hbcore.cli.compare.data import stdlib_source
from hbcore.cli.compare.model import GPTConfig, build_model

WARMUP = 0.05
"""Of the steps."""


@dataclass(frozen=True)
class Setting:
    """What all runs share."""

    config: GPTConfig
    steps: int
    batch: int
    every: int
    device: str


SETTINGS = {
    "large": Setting(GPTConfig(dim=384, depth=6, heads=6, context=256), steps=500, batch=16, every=20, device="cuda"),
    "small": Setting(GPTConfig(dim=192, depth=4, heads=4, context=128), steps=500, batch=16, every=25, device="cpu"),
}
"""Of 11 and 2 million parameters."""


class Text:
    """The Python files of site-packages as bytes on the device; the last tenth is held out."""

    def __init__(self, setting: Setting) -> None:
        source = stdlib_source(Path(sysconfig.get_paths()["purelib"]))
        data = torch.frombuffer(bytearray(source), dtype=torch.uint8).to(setting.device)
        cut = len(data) * 9 // 10
        self.bytes, self.setting = len(data), setting
        self.train, held_out = data[:cut], data[cut:]
        starts = torch.linspace(0, len(held_out) - setting.config.context - 1, 256, dtype=torch.float64).long()
        self.validation = [self._windows(held_out, part) for part in starts.split(64)]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows: inputs and targets, ``[batch, context]``."""
        last = len(self.train) - self.setting.config.context
        return self._windows(self.train, torch.randint(last, (self.setting.batch,), generator=generator))

    def _windows(self, data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        at = starts.to(data.device)[:, None] + torch.arange(self.setting.config.context + 1, device=data.device)
        rows = data[at].long()
        return rows[:, :-1], rows[:, 1:]


class Pass:
    """A model whose gradients stay where they are, and its forward and backward pass: on a GPU one CUDA graph."""

    def __init__(self, text: Text) -> None:
        self.text, self.setting = text, text.setting
        self.model = build_model(self.setting.config, 0).to(self.setting.device)
        self.inputs, self.targets = text.batch(torch.Generator())
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.graph: Any = None
        if self.setting.device == "cuda":
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run()
            self.graph = graph

    def reset(self, seed: int) -> None:
        """The weights that a seed begins with."""
        fresh = build_model(self.setting.config, seed)
        with torch.no_grad():
            for p, q in zip(self.model.parameters(), fresh.parameters(), strict=True):
                p.copy_(q)

    def backward(self, generator: torch.Generator) -> None:
        """The gradients of the next batch."""
        inputs, targets = self.text.batch(generator)
        self.inputs.copy_(inputs)
        self.targets.copy_(targets)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()

    def _run(self) -> None:
        torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
        with torch.autocast(self.setting.device, torch.bfloat16, cache_enabled=False):
            loss = self.model.loss(self.inputs, self.targets)
        loss.backward()  # type: ignore[no-untyped-call]


class Run:
    """A model and its optimizer."""

    def __init__(self, trial: Trial, pass_: Pass) -> None:
        self.text, self.setting, self.pass_ = pass_.text, pass_.setting, pass_
        pass_.reset(trial.seed)
        self.model = pass_.model
        cls = hbcore.get(trial.name)
        self.free = hasattr(cls, "eval") and "modes" in hbcore.registry.info(trial.name).spec.capabilities
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = {"lr": trial.lr, "weight_decay": trial.weight_decay, "seed": trial.seed, "consume_grad": False}
            self.optimizer: Any = cls(self.model.named_parameters(), **given, **trial.options)
        self.lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(trial.seed)

    def step(self, t: int) -> None:
        """Step ``t``, from 0."""
        steps = self.setting.steps
        scale = min(1.0, (t + 1) / (WARMUP * steps))
        if not self.free:
            scale *= min(1.0, (steps - t) / ((1 - WARMUP) * steps))
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * scale
        self.pass_.backward(self.generator)
        self.optimizer.step()

    @torch.no_grad()
    def held_out(self) -> float:
        """Nats per byte on the held-out text."""
        if self.free:
            self.optimizer.eval()
        with torch.autocast(self.setting.device, torch.bfloat16):
            loss = torch.stack([self.model.loss(*batch) for batch in self.text.validation]).mean().item()
        if self.free:
            self.optimizer.train()
        return loss


def train(trial: Trial, pass_: Pass) -> dict[str, Any]:
    """Train to the end, or until the loss is not a number: the held-out curve as ``[step, loss]`` pairs."""
    run, setting, curve = Run(trial, pass_), pass_.setting, list[tuple[int, float]]()
    for t in range(setting.steps):
        run.step(t)
        if (t + 1) % setting.every == 0:
            curve.append((t + 1, run.held_out()))
            if not math.isfinite(curve[-1][1]):
                break
    found = {"name": trial.name, "lr": trial.lr, "weight_decay": trial.weight_decay, "seed": trial.seed}
    return {**found, "loss": curve[-1][1], "curve": curve}


def timed(trial: Trial, pass_: Pass) -> float:
    """Milliseconds a step, forward and backward included, over all steps after a third of them."""
    run, start = Run(trial, pass_), 0.0
    steps = 120 if run.setting.device == "cuda" else 30
    for t in range(steps):
        if t == steps // 3:
            _wait(run.setting.device)
            start = time.perf_counter()
        run.step(t)
    _wait(run.setting.device)
    return (time.perf_counter() - start) / (steps - steps // 3) * 1e3


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
