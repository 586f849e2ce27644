"""Who takes part, and the runs with which each finds its learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import hbcore
from hbcore import registry

NAMES = (
    *("LATHER", "KLSOAP", "SOAP", "SOLP", "PSGDKron", "MuonAdamW", "Scion"),  # the slowest first: workers end together
    *("AdamW", "SGD", "Lion", "ADOPT", "AdEMAMix", "SFAdamW", "Adafactor"),
    *("LaProp", "NAdam"),
)

OPTIONS: dict[str, dict[str, Any]] = {"NAdam": {"decoupled_weight_decay": True}}
"""What a contender needs so that its decay is decoupled, as everybody else's is: the search takes that for granted."""

DECAY = 1e-4
"""What a step subtracts of a weight, ``lr * weight_decay``, in the search for the learning rate."""

SEEDS = (1, 2, 3, 4)
"""Those that count; seed 0 is for tuning."""


@dataclass(frozen=True)
class Trial:
    """One run: an optimizer, what was searched for, a seed."""

    name: str
    lr: float
    weight_decay: float
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """What the optimizer needs beside them."""
        return OPTIONS.get(self.name, {})

    @property
    def key(self) -> str:
        """What identifies it among the runs that are done."""
        return f"{self.name} lr={self.lr:.4g} weight_decay={self.weight_decay:.4g} seed={self.seed}"


class Search:
    """The trials of one optimizer, one after the other: a coarse line of learning rates, a finer one, then the decay."""

    def __init__(self, name: str) -> None:
        self.name, self.results = name, dict[Trial, float]()
        spec = registry.info(name).spec
        self.centre = spec.small_lr or float(hbcore.get(name)([_parameter()]).param_groups[0]["lr"])

    def trials(self) -> Iterator[Trial]:
        """The next trial depends on the :attr:`results` of those before."""
        for factor in (1.0, 0.32, 3.2, 0.1, 10.0):
            yield self._trial(self.centre * factor, DECAY)
        best = self.best().lr
        for factor in (0.56, 1.8):
            yield self._trial(best * factor, DECAY)
        best = self.best().lr
        for decay in (0.0, 5 * DECAY):
            yield self._trial(best, decay)
        winner = self.best()
        for seed in SEEDS:
            yield Trial(self.name, winner.lr, winner.weight_decay, seed)

    def best(self) -> Trial:
        """The trial on seed 0 with the lowest loss."""
        tuned = {t: loss for t, loss in self.results.items() if t.seed == 0}
        return min(tuned, key=lambda t: tuned[t] if tuned[t] == tuned[t] else float("inf"))

    def _trial(self, lr: float, decay: float) -> Trial:
        return Trial(self.name, lr, decay / lr, 0)


def _parameter() -> Any:
    import torch

    return torch.nn.Parameter(torch.zeros(2, 2))
