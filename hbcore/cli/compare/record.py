"""The record of one run: plain numbers, appended as the run proceeds, so that an interrupted run can be reported."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Status = Literal["pending", "partial", "completed", "diverged", "failed"]


Origin = Literal["given", "small models", "tuned", "default"]
"""Who chose a learning rate: the command line, the plugin's ``small_lr``, ``--tune``, or the class' default."""


class Step(NamedTuple):
    """One training step. ``loss`` and ``seconds`` (of training so far) are measured before the update."""

    loss: float
    seconds: float
    step_ms: float  # optimizer.step() alone
    iteration_ms: float  # batch, forward, backward and step


class Trial(NamedTuple):
    """One short run of ``--tune``: a learning rate and the validation loss that it led to; None if it diverged."""

    lr: float
    loss: float | None


class Validation(NamedTuple):
    """One validation: the loss after ``step`` updates and ``seconds`` of training."""

    step: int
    loss: float
    seconds: float


class Norms(NamedTuple):
    """Root mean squares of each parameter's weights before ``step`` and of what the step added to them."""

    step: int
    update_rms: list[float]
    weight_rms: list[float]


@dataclass
class Run:
    """The record of one optimizer's run. Losses are nats per byte.

    Seconds start just before the optimizer's constructor and include compilation, but not validation: validating more often
    must not make a run look slower. Values measured together are appended together, so Ctrl-C cannot leave half of them.

    ``lr`` is the first parameter group's before the first step; ``lr_from`` says who chose it, and ``trials`` how.
    ``norms`` are of the parameters called ``norm_names``. ``resumed`` are the counts of steps after which an interrupted run
    went on in another process. ``peak_bytes`` is the most device memory that an iteration took, where the device counts it.
    """

    label: str
    optimizer: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    lr_from: Origin = "default"
    trials: list[Trial] = field(default_factory=list)
    status: Status = "pending"
    error: str | None = None
    steps: list[Step] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    constructor_seconds: float = 0.0
    state_bytes_per_param: float | None = None
    backend: str | None = None
    seed: int = 0
    norm_names: list[str] = field(default_factory=list)
    norms: list[Norms] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def finished(self) -> bool:
        """Whether more steps would change nothing."""
        return self.status in ("completed", "diverged")

    @property
    def last_validation(self) -> Validation | None:
        """The final validation; None if the run diverged, or was not validated after the first step."""
        if self.status == "diverged" or len(self.validations) < 2 or not math.isfinite(self.validations[-1].loss):
            return None
        return self.validations[-1]

    @property
    def final_val_loss(self) -> float | None:
        """The loss of :attr:`last_validation`."""
        return None if self.last_validation is None else self.last_validation.loss

    @property
    def first_step_seconds(self) -> float | None:
        """Constructor plus first ``step()``, including compilation."""
        return self.constructor_seconds + self.steps[0].step_ms / 1e3 if self.steps else None

    def summary(self) -> dict[str, Any]:
        """The numbers of the table. Timings exclude the first step, which has its own figure, and the first of a resumed run.

        ``ms_per_step`` is a median, the cost of a typical step. ``ms_per_iteration`` is a mean, which includes the cost of
        rules that do expensive work every tenth step, for example.
        """
        later = [step for i, step in enumerate(self.steps) if i and i not in self.resumed]
        return {
            "lr": self.lr,
            "final_val_loss": self.final_val_loss,
            "final_val_step": None if self.last_validation is None else self.last_validation.step,
            "ms_per_step": statistics.median(step.step_ms for step in later) if later else None,
            "ms_per_iteration": statistics.fmean(step.iteration_ms for step in later) if later else None,
            "first_step_seconds": self.first_step_seconds,
            "state_bytes_per_param": self.state_bytes_per_param,
            "backend": self.backend,
            "peak_bytes": self.peak_bytes,
        }


class Average:
    """An exponential moving average without bias towards zero: the first result is the first value."""

    def __init__(self, decay: float = 0.95, total: float = 0.0, weight: float = 0.0) -> None:
        self._decay, self._sum, self._weight = decay, total, weight

    @property
    def state(self) -> tuple[float, float]:
        """``total`` and ``weight`` of an average that goes on from here."""
        return self._sum, self._weight

    def add(self, value: float) -> float:
        """Add ``value`` and return the average so far."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self._sum / self._weight
