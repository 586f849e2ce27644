"""Draws ``compare.png``: loss over steps and over seconds."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hbcore.cli.compare.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's palette, which colour-blind readers can distinguish; without its yellow, too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "h", "p")
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))  # the second and third pass through the palette use dashes
_KEY = "line: training loss, smoothed; points and figures: validation loss"
_BEYOND = "; cross: diverged, and a level line at the top is a loss beyond the panel"
INK = "#333333"
DPI = 130
LABEL_HEIGHT = 0.042  # of a label, in heights of a panel
CEILING = 0.03  # how far below the top a run that has left the panel is drawn


def draw(runs: Sequence[Run], title: str, subtitle: str, path: Path) -> None:
    """Draw two panels, loss over steps and over seconds, and write them to ``path`` as PNG.

    Lines show the smoothed training loss, points the validation loss. A run's colour does not depend on its rank.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    shown = [(index, run) for index, run in enumerate(runs) if run.steps]
    columns = min(3, max(1, len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(12, 5.4 + 0.25 * rows), dpi=DPI, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    limits = _limits([run for _, run in shown])
    if limits:
        left.set_ylim(*limits)
    for axes, seconds, label in (
        (left, False, "steps"),
        (right, True, "seconds of training, log scale (compiling included, validation not)"),
    ):
        curves = [Curve.of(run, index, seconds) for index, run in shown]
        for curve in curves:
            _draw(axes, curve, limits)
        _dress(axes, label)
        if seconds and shown:
            _log(axes, curves)
        elif shown:
            axes.set_xlim(left=0)
        _label_ends(axes, curves, limits)
    left.set_title(title, loc="left", fontsize=15, fontweight="bold", pad=30)
    under_title = {"xy": (0, 1), "xytext": (0, 12), "xycoords": "axes fraction", "textcoords": "offset points"}
    left.annotate(subtitle, **under_title, fontsize=10.5, color=INK, in_layout=False)
    left.set_ylabel("loss (nats per byte); lower is better", fontsize=11, color=INK)
    handles, labels = _legend(shown)
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=11,
            title=_KEY + (_BEYOND if any(run.status == "diverged" for _, run in shown) else ""),
            title_fontsize=10,
        )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, a quarter of the size. Pillow comes with matplotlib."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)


@dataclass(frozen=True)
class Curve:
    """One run in one panel: its line up to the last finite loss, and its validations."""

    run: Run
    index: int
    x: list[float]
    y: list[float]
    points: list[tuple[float, float]]

    @classmethod
    def of(cls, run: Run, index: int, seconds: bool) -> Curve:
        """The curve over steps or over seconds. On the log axis nothing is at zero seconds."""
        first = 1 if seconds else 0  # before the first step only the constructor has run
        end = next((i for i, step in enumerate(run.steps) if not math.isfinite(step.loss)), len(run.steps))
        xs = [step.seconds if seconds else float(i) for i, step in enumerate(run.steps)]
        # Smoothing would hide when and how a run diverged.
        ys = [step.loss for step in run.steps] if run.status == "diverged" else _training(run)
        line = list(zip(xs[first:end], ys[first:end], strict=True)) if end > first else []
        points = [(p.seconds if seconds else float(p.step), p.loss) for p in run.validations]
        points = [(x, y) for x, y in points if math.isfinite(y) and (x > 0 or not seconds)]
        return cls(run, index, [x for x, _ in line], [y for _, y in line], points)

    @property
    def colour(self) -> str:
        """The run's colour, in both panels."""
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


def _training(run: Run) -> list[float]:
    return smoothed([step.loss for step in run.steps])


def _look(index: int) -> dict[str, object]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def _draw(axes: Axes, curve: Curve, limits: tuple[float, float] | None) -> None:
    top = math.inf if limits is None else limits[1] - CEILING * (limits[1] - limits[0])
    axes.plot(curve.x, [min(y, top) for y in curve.y], linewidth=1.8, **_look(curve.index))  # type: ignore[arg-type]
    axes.plot(
        [x for x, _ in curve.points],
        [y for _, y in curve.points],
        linestyle="none",
        marker=MARKERS[curve.index % len(MARKERS)],
        markersize=6.5,
        markerfacecolor=curve.colour,
        markeredgecolor="white",
        markeredgewidth=0.9,
        zorder=3,
    )
    if curve.run.status == "diverged" and curve.x:
        axes.plot([curve.x[-1]], [min(curve.y[-1], top)], marker="X", markersize=11, color=curve.colour, zorder=4)


def _log(axes: Axes, curves: Sequence[Curve]) -> None:
    """A log axis with plain numbers; the first step is where it begins, and the labels need room behind the end."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    every = [x for curve in curves for x in (*curve.x, *(x for x, _ in curve.points))]
    if not every:
        return
    axes.set_xscale("log")
    axes.set_xlim(min(every) / 1.1, max(every) * 1.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))


def _label_ends(axes: Axes, curves: Sequence[Curve], limits: tuple[float, float] | None) -> None:
    """Each run's label at the end of its line, moved up or down where it would overlap another."""
    if limits is None:
        return
    ends = []
    for curve in curves:
        if curve.x:
            last = curve.points[-1] if curve.points and curve.points[-1][0] >= curve.x[-1] else (curve.x[-1], curve.y[-1])
            ends.append((min(last[1], limits[1] - CEILING * (limits[1] - limits[0])), last[0], curve))
    ends.sort(key=lambda end: end[:2])
    height = LABEL_HEIGHT * (limits[1] - limits[0])
    for (_, x, curve), y in zip(ends, spread([end[0] for end in ends], height, *limits), strict=True):
        diverged = " (diverged)" if curve.run.status == "diverged" else ""
        axes.annotate(
            f"{curve.run.label}{diverged}",
            xy=(x, y),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=curve.colour,
            fontweight="bold",
            annotation_clip=False,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            zorder=5,
        )


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted heights, moved as little as is needed to be ``gap`` apart and within ``low`` and ``high``, if there is room."""
    groups: list[list[float]] = []  # [centre, count] of labels that touch
    for wanted in heights:
        groups.append([wanted, 1.0])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * (groups[-1][1] + groups[-2][1]) / 2:
            centre, count = groups.pop()
            below, number = groups[-1]
            groups[-1] = [(centre * count + below * number) / (count + number), count + number]
        half = gap * (groups[-1][1] - 1) / 2
        groups[-1][0] = min(max(groups[-1][0], low + half), max(high - half, low + half))
    return [centre + gap * (i - (count - 1) / 2) for centre, count in groups for i in range(int(count))]


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=11, color=INK)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=10, length=0, labelleft=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def _limits(runs: Sequence[Run]) -> tuple[float, float] | None:
    """From just below the lowest loss to just above the first, so that a diverging run does not flatten the others."""
    lowest = [v for run in runs for v in (*_training(run), *(p.loss for p in run.validations)) if math.isfinite(v)]
    first = [run.validations[0].loss for run in runs if math.isfinite(run.validations[0].loss)]
    if not lowest or not first:
        return None
    margin = 0.04 * max(max(first) - min(lowest), 0.1)
    above = 3 if any(run.status == "diverged" for run in runs) else 1
    return min(lowest) - margin, max(first) + above * margin


def _legend(shown: Sequence[tuple[int, Run]]) -> tuple[list[Line2D], list[str]]:
    """Best first. Incomplete runs are marked, because their loss is not comparable."""
    from matplotlib.lines import Line2D

    def rank(entry: tuple[int, Run]) -> float:
        final = entry[1].final_val_loss
        return math.inf if final is None else final

    handles, labels = [], []
    for index, run in sorted(shown, key=rank):
        handles.append(Line2D([], [], marker=MARKERS[index % len(MARKERS)], **_look(index)))  # type: ignore[arg-type]
        lr = "" if run.lr is None else f", lr {run.lr:g}"
        final = "" if run.final_val_loss is None else f": {run.final_val_loss:.3f}"
        ending = "" if run.status == "completed" else f" ({run.status} at step {len(run.steps)})"
        labels.append(f"{run.label}{lr}{final}{ending}")
    return handles, labels
