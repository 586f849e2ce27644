"""Draws ``bench.png``: window times relative to torch fused, grouped by shape set; one panel per rule and precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbcore.cli.bench.record import Row, baseline
from hbcore.cli.bench.report import grouped, milliseconds, relative_ms
from hbcore.cli.compare.plot import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 0.62  # width in inches of a bar with its label
TALLEST = 3.0
"""Bars longer than this many baselines are truncated and labelled, so that one slow library does not flatten the others."""


def draw(rows: Sequence[Row], title: str, subtitle: str, path: Path) -> None:
    """Draw the rows that have windows and write them to ``path`` as PNG. Writes nothing if there are none.

    A bar's height is its time relative to torch fused (or to torch's other implementation, or to the first row), and its
    label is the time in milliseconds. The line across a bar is the time to move its bytes at copy speed.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    shown = [row for row in rows if row.windows_ms]
    if not shown:
        return
    panels = grouped(shown, "family", "dtype")
    colours = _colours(shown)
    slots = max(sum(len(g) + 1 for g in grouped(panel, "shapes").values()) for panel in panels.values())
    size = (max(7.5, 1.2 + BAR * slots), 1.5 + 3.1 * len(panels))
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for ax, ((family, dtype), panel) in zip(axes, panels.items(), strict=True):
        _panel(ax, panel, colours)
        ax.set_title(f"{family}, {dtype}", loc="left", fontsize=11, color=INK)
    figure.suptitle(f"{title}\n\n", x=0.01, ha="left", fontsize=14, fontweight="bold")
    figure.text(0.01, 1 - 0.42 / size[1], subtitle, ha="left", va="top", fontsize=9.5, color=INK)
    handles, labels = _legend(colours)
    columns = max(1, min(4, len(labels), int(size[0] / 2.6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    figure.savefig(path, format="png")


def _colours(rows: Sequence[Row]) -> dict[str, dict[str, object]]:
    """Label -> style, the same in every panel; the second pass through the palette is hatched."""
    labels = list(dict.fromkeys(row.label for row in rows))
    return {
        label: {"facecolor": COLOURS[i % len(COLOURS)], "hatch": (None, "///", "...")[i // len(COLOURS) % 3]}
        for i, label in enumerate(labels)
    }


def _panel(axes: Axes, rows: Sequence[Row], colours: Mapping[str, dict[str, object]]) -> None:
    left, ticks, top = 0.0, [], 1.0
    for (shapes,), group in grouped(rows, "shapes").items():
        base = baseline(group)
        assert base is not None
        for i, row in enumerate(group):
            top = max(top, _bar(axes, left + i, row, base, colours[row.label]))
        reference = f"1.0 = {base.label}"
        ticks.append((left + (len(group) - 1) / 2, f"{shapes}\n{reference}"))
        left += len(group) + 1
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    axes.set_xlim(-1, left - 1)
    axes.set_ylim(0, top * 1.14)
    axes.set_ylabel("time of a step, relative", fontsize=10, color=INK)
    axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9.5, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def _bar(axes: Axes, x: float, row: Row, base: Row, look: dict[str, object]) -> float:
    """Draw one bar with its label and floor; return the height that it occupies."""
    ratio, ms = relative_ms(row, base), row.summary()["window_ms"]
    assert ratio is not None
    height = min(ratio, TALLEST)
    axes.bar(x, height, width=0.82, edgecolor="white", **look)  # type: ignore[arg-type]
    text = milliseconds(ms) if ratio <= TALLEST else f"{milliseconds(ms)}\n({ratio:.1f}x)"
    axes.annotate(
        text, (x, height), xytext=(0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8, color=INK
    )  # fmt: skip
    if ratio > TALLEST:  # a gap near the top, like that of a broken axis
        axes.plot([x - 0.45, x + 0.45], [height * 0.93, height * 0.96], color="white", linewidth=3)
    if row.floor_ms is not None:
        floor = row.floor_ms / (ms / ratio)
        if floor <= height:
            axes.plot([x - 0.41, x + 0.41], [floor, floor], color="white", linewidth=3.2, zorder=3)
            axes.plot([x - 0.41, x + 0.41], [floor, floor], color="black", linewidth=1.6, zorder=4)
    return height if ratio <= TALLEST else height * 1.06  # room for the second line of the label


def _legend(colours: Mapping[str, dict[str, object]]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    bars: list[Any] = [Patch(edgecolor="white", **look) for look in colours.values()]  # type: ignore[arg-type]
    floor = Line2D([], [], color="black", linewidth=1.6)
    return [*bars, floor], [*colours, "its bytes at copy speed"]
