"""The training loop shared by all optimizers, and its timing."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hbcore.cli.compare.data import Batch
from hbcore.cli.compare.record import Average, Norms, Run, Step, Validation
from hbcore.cli.compare.task import Task

OptimizerFactory = Callable[[Iterator[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Saved = dict[str, Any]
"""What an interrupted run goes on from: tensors and plain numbers; its record is kept beside it."""


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """What the loop calls, outside its clock.

    Args:
        step: after every step, with the number of completed steps and a moving average of the training loss.
        validation: after every validation but the first and the last, with the number of completed steps and the loss. May
            raise, which ends the run.
        save: after the same validations, with all that the run needs to go on from there. None to save nothing.
    """

    step: Callable[[int, float], None] = field(default=_nothing)
    validation: Callable[[int, float], None] = field(default=_nothing)
    save: Callable[[Saved], None] | None = None


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in ``optimizer.state``, including step counters."""

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return sum(map(count, value)) if isinstance(value, (list, tuple)) else 0

    return sum(count(entry) for entry in optimizer.state.values())


def train(factory: OptimizerFactory, task: Task, run: Run, hooks: Hooks, saved: Saved | None = None) -> None:
    """Train a fresh copy of the model and fill in ``run``.

    ``run.status`` becomes "completed" or, at the first non-finite loss, "diverged". Exceptions, Ctrl-C included, propagate;
    ``run`` then contains everything measured so far.

    Args:
        factory: named parameters -> optimizer.
        task: what to train, shared by all runs.
        run: the record to fill in.
        hooks: what to call on the way.
        saved: where to go on, as ``hooks.save`` was given it; ``run`` is then the record up to there. What follows is the
            same, bit for bit, as in a run that was never interrupted.
    """
    _Trainer(factory, task, run, saved).train(hooks)


class _Trainer:
    """One run: a model, its optimizer, and a clock that stops during validation."""

    def __init__(self, factory: OptimizerFactory, task: Task, run: Run, saved: Saved | None) -> None:
        self.task, self.run = task, run
        self.model = task.new_model()
        run.status = "partial"  # until it completes
        # Seeded once per run: a run's random numbers must not depend on earlier runs.
        torch.manual_seed(task.seed)
        self.done, self.average, self.batches = 0, Average(), task.batches()
        if saved is None:
            self._validate(step=0, seconds=0.0)  # before the optimizer exists, so that it cannot influence the result
        start = self._now()
        self.optimizer = factory(self.model.named_parameters())
        if saved is None:
            self.seconds = run.constructor_seconds = self._now() - start
        self._set_mode("train")
        if saved is not None:
            self._restore(saved)

    def train(self, hooks: Hooks) -> None:
        task, run = self.task, self.run
        try:
            for step in range(self.done + 1, task.steps + 1):
                loss = self._iterate(step)
                self.done = step
                hooks.step(step, self.average.add(loss))
                finite = math.isfinite(loss)
                due = step % task.eval_every == 0 or step == task.steps
                if due:
                    self._set_mode("eval")
                    validated = self._validate(step, self.seconds)
                    finite &= math.isfinite(validated)
                    self._set_mode("train")
                if not finite:
                    run.status = "diverged"
                    return
                if due and step < task.steps:
                    if hooks.save is not None:
                        hooks.save(self._snapshot())
                    hooks.validation(step, validated)
            run.status = "completed"
        finally:
            # Read at the end: state is created by the first step, and a backend may fall back while it compiles.
            run.state_bytes_per_param = state_bytes(self.optimizer) / task.num_parameters
            run.backend = str(getattr(getattr(self.optimizer, "report", None), "backend", "torch"))

    def _iterate(self, step: int) -> float:
        """One batch, forward, backward and step; returns the loss before the step."""
        task = self.task
        measured = task.norms_every and (step == 1 or step % task.norms_every == 0)
        before = [p.detach().clone() for p in self.model.parameters()] if measured else []
        counted = not measured and task.device.type == "cuda"  # the copies are no part of what an iteration needs
        if counted:
            torch.cuda.reset_peak_memory_stats(task.device)
        start = self._now()
        batch = next(self.batches)
        before_step, loss = self._step(batch)
        end = self._now()
        value = float(loss.item())
        self.run.steps.append(Step(value, self.seconds, (end - before_step) * 1e3, (end - start) * 1e3))
        self.seconds += end - start
        if measured:
            self._measure(step, before)
        if counted:
            self.run.peak_bytes = max(self.run.peak_bytes or 0, torch.cuda.max_memory_allocated(task.device))
        return value

    def _step(self, batch: Batch) -> tuple[float, Any]:
        """The time when ``optimizer.step`` began, and the loss."""

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.task.loss(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if getattr(self.optimizer, "requires_closure", False):
            # The optimizer evaluates the loss itself, perhaps several times, which is part of the cost of its step.
            before_step = self._now()
            return before_step, self.optimizer.step(closure)  # type: ignore[arg-type]
        loss = closure()
        before_step = self._now()
        self.optimizer.step()
        return before_step, loss

    @torch.no_grad()
    def _measure(self, step: int, before: list[Tensor]) -> None:
        """Record the size of each parameter before the step, and of what the step added to it."""
        names, moved, held = [], [], []
        for (name, param), old in zip(self.model.named_parameters(), before, strict=True):
            if old.numel():
                names.append(name)
                moved.append(_rms(param - old))
                held.append(_rms(old))
        self.run.norm_names = names
        self.run.norms.append(Norms(step, torch.stack(moved).tolist(), torch.stack(held).tolist()))

    @torch.no_grad()
    def _validate(self, step: int, seconds: float) -> float:
        """Mean loss over the held-out windows, recorded and returned."""
        self.model.eval()
        total = torch.zeros((), device=self.task.device)
        for batch in self.task.held_out:
            total += self.task.loss(self.model, batch) * len(batch[0])
        self.model.train()
        loss = total.item() / sum(len(batch[0]) for batch in self.task.held_out)
        self.run.validations.append(Validation(step, loss, seconds))
        return loss

    def _set_mode(self, mode: str) -> None:
        """Schedule-free methods validate with different weights than they train with; other optimizers have no modes."""
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()

    def _snapshot(self) -> Saved:
        device = self.task.device
        return {
            "done": self.done,
            "seconds": self.seconds,
            "average": self.average.state,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "device_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def _restore(self, saved: Saved) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.done, self.seconds, self.average = saved["done"], saved["seconds"], Average(0.95, *saved["average"])
        self.batches = itertools.islice(self.task.batches(), self.done, None)
        self.run.resumed.append(self.done)
        torch.set_rng_state(saved["generator"].cpu())
        if saved["device_generator"] is not None:
            torch.cuda.set_rng_state(saved["device_generator"].cpu(), self.task.device)

    def _now(self) -> float:
        """Seconds, after the device has finished all queued work: launching a kernel does not wait for it."""
        getattr(torch, self.task.device.type).synchronize()
        return time.perf_counter()


def _rms(values: Tensor) -> Tensor:
    """A 0-d float32 tensor, whatever the dtype of ``values``."""
    return values.abs().float().square().mean().sqrt()
