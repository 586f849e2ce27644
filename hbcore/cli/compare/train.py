"""The training loop shared by all optimizers, and its timing."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hbcore.cli.compare.data import Corpus, training_batches, validation_batches
from hbcore.cli.compare.model import GPT, GPTConfig, build_model
from hbcore.cli.compare.record import Average, Run, Step, Validation

OptimizerFactory = Callable[[Iterator[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """Everything that the runs share: initial weights, batches, held-out batches, schedule."""

    initial: GPT
    corpus: Corpus
    validation: list[Batch]
    context: int
    batch_size: int
    steps: int
    eval_every: int
    seed: int
    device: torch.device

    @classmethod
    def build(
        cls,
        config: GPTConfig,
        corpus: Corpus,
        *,
        batch_size: int,
        steps: int,
        eval_every: int,
        seed: int,
        device: torch.device,
    ) -> Task:
        """Initialise the model (on the CPU, so that every device starts from the same weights) and cut the batches."""
        validation = validation_batches(corpus.validation, config.context, batch_size)
        validation = [(tokens.to(device), targets.to(device)) for tokens, targets in validation]
        initial = build_model(config, seed)
        return cls(initial, corpus, validation, config.context, batch_size, steps, eval_every, seed, device)

    @property
    def num_parameters(self) -> int:
        """Number of parameters (scalars) of the model."""
        return sum(p.numel() for p in self.initial.parameters())

    def new_model(self) -> GPT:
        """A copy of the initial model on the device."""
        return copy.deepcopy(self.initial).to(self.device)

    def warm_up(self) -> None:
        """One forward and backward pass on a throwaway model, so that no run pays for torch's one-time initialisation."""
        loss: Tensor = self.new_model().loss(*next(self.batches()))
        loss.backward()  # type: ignore[no-untyped-call]

    def batches(self) -> Iterator[Batch]:
        """The batches of a run, from the beginning, on the device."""
        for tokens, targets in training_batches(self.corpus.train, self.context, self.batch_size, self.seed):
            yield tokens.to(self.device), targets.to(self.device)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in ``optimizer.state``, including step counters."""

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return sum(map(count, value)) if isinstance(value, (list, tuple)) else 0

    return sum(count(entry) for entry in optimizer.state.values())


def train(factory: OptimizerFactory, task: Task, run: Run, on_step: Callable[[int, float], None]) -> None:
    """Train a fresh copy of the model and fill in ``run``.

    ``run.status`` becomes "completed" or, at the first non-finite loss, "diverged". Exceptions, Ctrl-C included, propagate;
    ``run`` then contains everything measured so far.

    Args:
        factory: named parameters -> optimizer.
        task: what to train, shared by all runs.
        run: the record to fill in.
        on_step: called after every step with the number of completed steps and a moving average of the training loss.
    """
    _Trainer(factory, task, run).train(on_step)


class _Trainer:
    """One run: a model, its optimizer, and a clock that stops during validation."""

    def __init__(self, factory: OptimizerFactory, task: Task, run: Run) -> None:
        self.task, self.run = task, run
        self.model = task.new_model()
        run.status = "partial"  # until it completes
        # Seeded once per run: a run's random numbers must not depend on earlier runs.
        torch.manual_seed(task.seed)
        self._validate(step=0, seconds=0.0)  # before the optimizer exists, so that it cannot influence the result
        start = self._now()
        self.optimizer = factory(self.model.named_parameters())
        self.seconds = run.constructor_seconds = self._now() - start
        self._set_mode("train")

    def train(self, on_step: Callable[[int, float], None]) -> None:
        task, run, average, batches = self.task, self.run, Average(), self.task.batches()
        try:
            for step in range(1, task.steps + 1):
                loss = self._iterate(batches)
                on_step(step, average.add(loss))
                finite = math.isfinite(loss)
                if step % task.eval_every == 0 or step == task.steps:
                    self._set_mode("eval")
                    finite &= math.isfinite(self._validate(step, self.seconds))
                    self._set_mode("train")
                if not finite:
                    run.status = "diverged"
                    return
            run.status = "completed"
        finally:
            # Read at the end: state is created by the first step, and a backend may fall back while it compiles.
            run.state_bytes_per_param = state_bytes(self.optimizer) / task.num_parameters
            run.backend = str(getattr(getattr(self.optimizer, "report", None), "backend", "torch"))

    def _iterate(self, batches: Iterator[Batch]) -> float:
        """One batch, forward, backward and step; returns the loss before the step."""
        start = self._now()
        tokens, targets = next(batches)

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model.loss(tokens, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if getattr(self.optimizer, "requires_closure", False):
            # The optimizer evaluates the loss itself, perhaps several times, which is part of the cost of its step.
            before_step = self._now()
            loss: Any = self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            loss = closure()
            before_step = self._now()
            self.optimizer.step()
        end = self._now()
        value = float(loss.item())
        self.run.steps.append(Step(value, self.seconds, (end - before_step) * 1e3, (end - start) * 1e3))
        self.seconds += end - start
        return value

    @torch.no_grad()
    def _validate(self, step: int, seconds: float) -> float:
        """Mean loss over the held-out windows, recorded and returned."""
        self.model.eval()
        total = torch.zeros((), device=self.task.device)
        for tokens, targets in self.task.validation:
            total += self.model.loss(tokens, targets) * len(tokens)
        self.model.train()
        loss = total.item() / sum(len(tokens) for tokens, _ in self.task.validation)
        self.run.validations.append(Validation(step, loss, seconds))
        return loss

    def _set_mode(self, mode: str) -> None:
        """Schedule-free methods validate with different weights than they train with; other optimizers have no modes."""
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()

    def _now(self) -> float:
        """Seconds, after the device has finished all queued work: launching a kernel does not wait for it."""
        getattr(torch, self.task.device.type).synchronize()
        return time.perf_counter()
