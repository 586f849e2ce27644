"""Draws ``compare.png``: loss over steps and over seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hbcore.cli.compare.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe and Ito's palette, which colour-blind readers can distinguish; without its yellow, too pale for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "h", "p")
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))  # the second and third pass through the palette use dashes
_KEY = "line: training loss, smoothed; points and figures: validation loss"
INK = "#333333"


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
    figure = Figure(figsize=(11, 5.4 + 0.25 * rows), dpi=150, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, run in shown:
        _curve(left, run, range(len(run.steps)), [point.step for point in run.validations], index)
        _curve(right, run, [s.seconds for s in run.steps], [point.seconds for point in run.validations], index)
    for axes, label in ((left, "steps"), (right, "seconds of training (compiling included, validation not)")):
        _dress(axes, label)
    left.set_title(title, loc="left", fontsize=15, fontweight="bold", pad=30)
    under_title = {"xy": (0, 1), "xytext": (0, 12), "xycoords": "axes fraction", "textcoords": "offset points"}
    left.annotate(subtitle, **under_title, fontsize=10.5, color=INK, in_layout=False)
    left.set_ylabel("loss (nats per byte)", fontsize=11, color=INK)
    if limits := _limits([run for _, run in shown]):
        left.set_ylim(*limits)
    handles, labels = _legend(shown)
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=11,
            title=_KEY,
            title_fontsize=10,
        )
    figure.savefig(path, format="png")


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


def _curve(axes: Axes, run: Run, x: Sequence[float], val_x: Sequence[float], index: int) -> None:
    axes.plot(x, _training(run), linewidth=1.8, **_look(index))  # type: ignore[arg-type]
    axes.plot(
        val_x,
        [point.loss for point in run.validations],
        linestyle="none",
        marker=MARKERS[index % len(MARKERS)],
        markersize=6.5,
        markerfacecolor=COLOURS[index % len(COLOURS)],
        markeredgecolor="white",
        markeredgewidth=0.9,
        zorder=3,
    )


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=11, color=INK)
    axes.set_xlim(left=0)
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
    return min(lowest) - margin, max(first) + margin


def _legend(shown: Sequence[tuple[int, Run]]) -> tuple[list[Line2D], list[str]]:
    """Best first. Incomplete runs are marked, because their loss is not comparable."""
    from matplotlib.lines import Line2D

    def rank(entry: tuple[int, Run]) -> float:
        final = entry[1].final_val_loss
        return math.inf if final is None else final

    handles, labels = [], []
    for index, run in sorted(shown, key=rank):
        handles.append(Line2D([], [], marker=MARKERS[index % len(MARKERS)], **_look(index)))  # type: ignore[arg-type]
        final = "" if run.final_val_loss is None else f": {run.final_val_loss:.3f}"
        labels.append(f"{run.label}{final}" + ("" if run.status == "completed" else f" ({run.status})"))
    return handles, labels
