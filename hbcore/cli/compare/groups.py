"""Runs of one label with different seeds, and what they have in common: mean, sigma, n."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hbcore.cli.compare.record import Run


class Spread(NamedTuple):
    """Mean, sample standard deviation (0 for a single value) and number of some values."""

    mean: float
    sigma: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None if there are no values."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


@dataclass(frozen=True)
class Group:
    """All runs of one label."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run with the first seed."""
        return self.runs[0]

    @property
    def complete(self) -> tuple[Run, ...]:
        """The runs whose final losses count. Others took fewer steps, so their losses are not comparable."""
        return tuple(run for run in self.runs if run.status == "completed" and run.final_val_loss is not None)

    @property
    def loss(self) -> Spread | None:
        """The final validation losses of the complete runs."""
        return Spread.of([run.final_val_loss for run in self.complete if run.final_val_loss is not None])

    @property
    def shown(self) -> tuple[Run, ...]:
        """The runs that a chart averages: the complete ones; the first that took a step if there are none."""
        return self.complete or tuple(run for run in self.runs if run.steps)[:1] or self.runs[:1]

    def summary(self) -> dict[str, Any]:
        """Means of the runs' summaries, over those that have the number, and the spread of the final loss.

        A single run's summary is its own.
        """
        each = [run.summary() for run in self.shown]
        means = {key: _mean([one[key] for one in each]) for key in each[0]}
        loss = self.loss
        return means | {"val_loss_sigma": loss.sigma if loss else None, "n": loss.n if loss else 0}

    @property
    def remark(self) -> str:
        """What is to be said of incomplete runs: ``"2 of 3 diverged"``, or of a single one, ``"diverged, step 7"``."""
        ended = [run for run in self.runs if run.status != "completed"]
        if len(self.runs) == 1:
            return remark(self.first)
        states = sorted({run.status for run in ended})
        return ", ".join(f"{sum(run.status == state for run in ended)} of {len(self.runs)} {state}" for state in states)


def remark(run: Run) -> str:
    """How an incomplete run ended; empty for a complete one."""
    if run.status == "completed":
        return ""
    return "failed" if run.status == "failed" else f"{run.status}, step {len(run.steps)}"


def _mean(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    numbers = [value for value in known if isinstance(value, (int, float))]
    if not known or len(numbers) < len(known) or len(set(known)) == 1:
        return known[0] if known else None
    return statistics.fmean(numbers)


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The groups, in the order in which their labels first appear."""
    labels = dict.fromkeys(run.label for run in runs)
    return [Group(label, tuple(run for run in runs if run.label == label)) for label in labels]


def shown_loss(group: Group, digits: int = 4) -> str:
    """``"2.0312"`` for one run, ``"2.0312 ± 0.0040"`` for several, ``"-"`` for none."""
    if group.loss is not None and len(group.runs) > 1:
        return f"{group.loss.mean:.{digits}f} ± {group.loss.sigma:.{digits}f}"
    final = group.shown[0].final_val_loss
    return "-" if final is None else f"{final:.{digits}f}"


def lowest(groups: Sequence[Group]) -> float | None:
    """The lowest mean final loss, if there are several to choose from."""
    known = [group.loss.mean for group in groups if group.loss is not None]
    return min(known) if len(known) > 1 else None


def averaged(columns: Sequence[Sequence[float]], pick: Callable[[Sequence[float]], float]) -> list[float]:
    """``pick`` of the finite values at each position; NaN where there are none. The columns may differ in length."""
    length = max(map(len, columns), default=0)
    rows = ([c[i] for c in columns if i < len(c) and math.isfinite(c[i])] for i in range(length))
    return [pick(row) if row else math.nan for row in rows]
