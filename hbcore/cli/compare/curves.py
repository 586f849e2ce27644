"""Curves to draw: smoothed losses over steps or seconds, averaged over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from hbcore.cli.compare.groups import Group, averaged
from hbcore.cli.compare.record import Run

# Okabe and Ito's palette, which colour-blind readers can distinguish; without its yellow, too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class Curve:
    """One label in one chart: its line up to the last finite loss, and its validations.

    With several seeds, lines and points are means over the complete runs, and ``sigmas`` the standard deviations of the line.
    """

    group: Group
    index: int
    x: list[float]
    y: list[float]
    points: list[tuple[float, float]]
    sigmas: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, group: Group, index: int, seconds: bool) -> Curve:
        """The curve over steps or over seconds. On the log axis nothing is at zero seconds."""
        runs = group.shown
        first = 1 if seconds else 0  # before the first step only the constructor has run
        # Smoothing would hide when and how a run diverged.
        lines = [[step.loss for step in run.steps] if run.status == "diverged" else training(run) for run in runs]
        ends = (next((i for i, s in enumerate(run.steps) if not math.isfinite(s.loss)), len(run.steps)) for run in runs)
        end = min(ends, default=0)
        ys = averaged(lines, statistics.fmean)
        xs = averaged([[step.seconds for step in run.steps] for run in runs], statistics.fmean)
        xs = xs if seconds else [float(i) for i in range(len(ys))]
        sigmas = averaged(lines, statistics.stdev)[first:end] if len(runs) > 1 else []
        place = averaged([[p.seconds if seconds else float(p.step) for p in run.validations] for run in runs], statistics.fmean)
        losses = averaged([[p.loss for p in run.validations] for run in runs], statistics.fmean)
        points = [(x, y) for x, y in zip(place, losses, strict=True) if math.isfinite(y) and (x > 0 or not seconds)]
        return cls(group, index, xs[first:end], ys[first:end], points, sigmas)

    @property
    def diverged(self) -> bool:
        """Whether the line ends where the loss stopped being finite."""
        return self.group.shown[0].status == "diverged"

    @property
    def colour(self) -> str:
        """The label's colour, in every chart."""
        return COLOURS[self.index % len(COLOURS)]


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred moving average; the window spans a fifteenth of the values.

    Unlike a trailing average, it does not lag behind a steep fall. The window narrows towards the start, so that the curve
    begins at the first loss. Non-finite values are skipped; a window without finite values yields NaN.
    """
    half, means = max(1, len(values) // 30), []
    for i in range(len(values)):
        reach = min(half, i)
        window = [value for value in values[i - reach : i + reach + 1] if math.isfinite(value)]
        means.append(math.fsum(window) / len(window) if window else math.nan)
    return means


def training(run: Run) -> list[float]:
    """The smoothed training loss."""
    return smoothed([step.loss for step in run.steps])


def limits(groups: Sequence[Group]) -> tuple[float, float] | None:
    """From just below the lowest loss to just above the first, so that a diverging run does not flatten the others."""
    runs = [run for group in groups for run in group.shown]
    lowest = [v for run in runs for v in (*training(run), *(p.loss for p in run.validations)) if math.isfinite(v)]
    first = [run.validations[0].loss for run in runs if run.validations and math.isfinite(run.validations[0].loss)]
    if not lowest or not first:
        return None
    margin = 0.04 * max(max(first) - min(lowest), 0.1)
    above = 3 if any(run.status == "diverged" for run in runs) else 1
    return min(lowest) - margin, max(first) + above * margin
