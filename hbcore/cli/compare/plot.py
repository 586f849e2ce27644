"""Draws ``compare.png``: loss over steps and over seconds."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hbcore.cli.compare.curves import COLOURS, Curve, limits, smoothed
from hbcore.cli.compare.groups import Group, grouped, shown_loss
from hbcore.cli.compare.record import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MARKERS = ("o", "s", "^", "D", "v", "h", "p")
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))  # the second and third pass through the palette use dashes
__all__ = ["COLOURS", "INK", "draw", "dress", "logarithmic", "save", "smoothed", "spread"]

_KEY = "line: training loss, smoothed; points and figures: validation loss"
_BAND = "; band: one standard deviation over n seeds"
_BEYOND = "; cross: diverged, and a level line at the top is a loss beyond the panel"
INK = "#333333"
DPI = 130
LABEL_HEIGHT = 0.042  # of a label, in heights of a panel
CEILING = 0.03  # how far below the top a run that has left the panel is drawn


def draw(runs: Sequence[Run], title: str, subtitle: str, path: Path, unit: str = "nats per byte") -> None:
    """Draw two panels, loss over steps and over seconds, and write them to ``path`` as PNG.

    Lines show the smoothed training loss, points the validation loss; with several seeds, their means, and bands the standard
    deviation. A label's colour does not depend on its rank.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    shown = [(index, group) for index, group in enumerate(grouped(runs)) if any(run.steps for run in group.runs)]
    columns = min(3, max(1, len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(12, 5.4 + 0.25 * rows), dpi=DPI, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    span = limits([group for _, group in shown])
    if span:
        left.set_ylim(*span)
    for axes, seconds, label in (
        (left, False, "steps"),
        (right, True, "seconds of training, log scale (compiling included, validation not)"),
    ):
        curves = [Curve.of(group, index, seconds) for index, group in shown]
        for curve in curves:
            _draw(axes, curve, span)
        dress(axes, label)
        if seconds and shown:
            _log(axes, curves)
        elif shown:
            axes.set_xlim(left=0)
        _label_ends(axes, curves, span)
    left.set_title(title, loc="left", fontsize=15, fontweight="bold", pad=30)
    under_title = {"xy": (0, 1), "xytext": (0, 12), "xycoords": "axes fraction", "textcoords": "offset points"}
    left.annotate(subtitle, **under_title, fontsize=10.5, color=INK, in_layout=False)
    left.set_ylabel(f"loss{f' ({unit})' if unit else ''}; lower is better", fontsize=11, color=INK)
    handles, labels = _legend(shown)
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=11,
            title=_key(shown),
            title_fontsize=10,
        )
    save(figure, path)


def _key(shown: Sequence[tuple[int, Group]]) -> str:
    several = any(len(group.complete) > 1 for _, group in shown)
    diverged = any(group.shown[0].status == "diverged" for _, group in shown)
    return _KEY + (_BAND if several else "") + (_BEYOND if diverged else "")


def save(figure: Figure, path: Path) -> None:
    """As a PNG of few colours, a quarter of the size. Pillow comes with matplotlib."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    image = Image.open(drawn).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)


def _look(index: int) -> dict[str, object]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def _draw(axes: Axes, curve: Curve, span: tuple[float, float] | None) -> None:
    top = math.inf if span is None else span[1] - CEILING * (span[1] - span[0])
    if curve.sigmas:
        low = [y - sigma for y, sigma in zip(curve.y, curve.sigmas, strict=True)]
        high = [y + sigma for y, sigma in zip(curve.y, curve.sigmas, strict=True)]
        axes.fill_between(curve.x, low, high, color=curve.colour, alpha=0.2, linewidth=0)
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
    if curve.diverged and curve.x:
        axes.plot([curve.x[-1]], [min(curve.y[-1], top)], marker="X", markersize=11, color=curve.colour, zorder=4)


def _log(axes: Axes, curves: Sequence[Curve]) -> None:
    """A log axis; the first step is where it begins, and the labels need room behind the end."""
    every = [x for curve in curves for x in (*curve.x, *(x for x, _ in curve.points))]
    if not every:
        return
    logarithmic(axes)
    axes.set_xlim(min(every) / 1.1, max(every) * 1.1)


def logarithmic(axes: Axes, subs: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Make the horizontal axis a log axis with plain numbers, at ``subs`` times each power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))


def _label_ends(axes: Axes, curves: Sequence[Curve], span: tuple[float, float] | None) -> None:
    """Each run's label at the end of its line, moved up or down where it would overlap another."""
    if span is None:
        return
    ends = []
    for curve in curves:
        if curve.x:
            last = curve.points[-1] if curve.points and curve.points[-1][0] >= curve.x[-1] else (curve.x[-1], curve.y[-1])
            ends.append((min(last[1], span[1] - CEILING * (span[1] - span[0])), last[0], curve))
    ends.sort(key=lambda end: end[:2])
    height = LABEL_HEIGHT * (span[1] - span[0])
    for (_, x, curve), y in zip(ends, spread([end[0] for end in ends], height, *span), strict=True):
        diverged = " (diverged)" if curve.diverged else ""
        axes.annotate(
            f"{curve.group.label}{diverged}",
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


def dress(axes: Axes, label: str) -> None:
    """The look of every panel: its axis, its grid."""
    axes.set_xlabel(label, fontsize=11, color=INK)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=10, length=0, labelleft=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def _legend(shown: Sequence[tuple[int, Group]]) -> tuple[list[Line2D], list[str]]:
    """Best first. Incomplete runs are marked, because their loss is not comparable."""
    from matplotlib.lines import Line2D

    handles, labels = [], []
    for index, group in sorted(shown, key=lambda entry: _rank(entry[1])):
        handles.append(Line2D([], [], marker=MARKERS[index % len(MARKERS)], **_look(index)))  # type: ignore[arg-type]
        lr = "" if group.first.lr is None else f", lr {group.first.lr:g}"
        loss = shown_loss(group, digits=3)
        final = "" if loss == "-" else f": {loss}"
        labels.append(f"{group.label}{lr}{final}{_ending(group)}")
    return handles, labels


def _rank(group: Group) -> float:
    if group.loss is not None:
        return group.loss.mean
    final = group.shown[0].final_val_loss
    return math.inf if final is None else final


def _ending(group: Group) -> str:
    if len(group.runs) > 1:
        return f" (n = {len(group.complete)}{', ' if group.remark else ''}{group.remark})"
    run = group.first
    return "" if run.status == "completed" else f" ({run.status} at step {len(run.steps)})"
