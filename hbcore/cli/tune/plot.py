"""Draws ``tune.png``: the loss of each trial, and over each hyperparameter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbcore.cli.compare.plot import COLOURS, INK, dress, logarithmic, save
from hbcore.cli.tune.study import Outcome, best
from hbcore.registry.search import Choice, Decay, LogUniform, Range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
STOPPED = "#999999"


def draw(outcomes: Sequence[Outcome], ranges: Mapping[str, Range], name: str, unit: str, path: Path) -> None:
    """Draw the losses in the order of the trials, with the best so far, and a panel for each number that was searched.

    Trials that were stopped are hollow, at the last loss that they reported; a cross marks those without any.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: ``path`` cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    panels = 1 + len(ranges)
    columns = min(COLUMNS, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(4.2 * columns, 0.9 + 3.1 * rows), dpi=130, layout="constrained", facecolor="white")
    every = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axes in every[panels:]:
        axes.set_visible(False)
    known = [value for o in outcomes if (value := _height(o)) is not None]
    top = _limit(every[0], outcomes, known)
    _order(every[0], outcomes, top)
    for axes, (key, searched) in zip(every[1:panels], ranges.items(), strict=True):
        _over(axes, outcomes, key, searched, top)
    for axes in every[:panels:columns]:
        axes.set_ylabel(f"val loss{f' ({unit})' if unit else ''}", fontsize=10, color=INK)
    found = best(outcomes)
    ending = "" if found is None else f", best {found.loss:.4f} in trial {found.number + 1}"
    complete = sum(o.loss is not None for o in outcomes)
    figure.suptitle(
        f"{name}: {len(outcomes)} trials, {complete} complete{ending}\n"
        "filled: complete; hollow: stopped early; cross: diverged or failed; star: the best",
        fontsize=11,
        color=INK,
    )
    save(figure, path)


def _height(outcome: Outcome) -> float | None:
    if outcome.loss is not None:
        return outcome.loss
    return outcome.curve[-1][1] if outcome.curve and outcome.state == "pruned" else None


def _limit(axes: Axes, outcomes: Sequence[Outcome], known: Sequence[float]) -> float:
    """Set the range of the losses; returns where trials without a loss, and those beyond, are drawn."""
    if not known:
        axes.set_ylim(0, 1)
        return 0.95
    complete = sorted(o.loss for o in outcomes if o.loss is not None) or sorted(known)
    low, typical = complete[0], complete[min(len(complete) - 1, (3 * len(complete)) // 4)]
    high = min(max(known), low + 3 * max(typical - low, 0.05))
    margin = 0.08 * max(high - low, 0.01)
    axes.set_ylim(low - margin, high + 2 * margin)
    return high + margin


def _mark(axes: Axes, x: Any, outcome: Outcome, top: float, first: bool) -> None:
    height = _height(outcome)
    colour = COLOURS[0] if outcome.loss is not None else STOPPED
    look: dict[str, Any] = {"marker": "o", "markersize": 6, "color": colour, "linestyle": "none"}
    if height is None:
        look |= {"marker": "x", "color": COLOURS[1]}
    elif outcome.loss is None:
        look |= {"markerfacecolor": "none"}
    if first:
        look |= {"marker": "*", "markersize": 13, "color": COLOURS[1], "zorder": 4}
    axes.plot([x], [top if height is None else min(height, top)], **look)


def _order(axes: Axes, outcomes: Sequence[Outcome], top: float) -> None:
    found = best(outcomes)
    for outcome in outcomes:
        _mark(axes, outcome.number + 1, outcome, top, outcome is found)
    so_far = itertools.accumulate((math.inf if o.loss is None else o.loss for o in outcomes), min)
    line = [(o.number + 1, value) for o, value in zip(outcomes, so_far, strict=True) if math.isfinite(value)]
    axes.step([x for x, _ in line], [min(y, top) for _, y in line], where="post", color=COLOURS[0], linewidth=1.2)
    dress(axes, "trial; line: the best so far")


def _over(axes: Axes, outcomes: Sequence[Outcome], key: str, searched: Range, top: float) -> None:
    found, name, place = best(outcomes), *_split(key)
    for outcome in outcomes:
        value = outcome.arguments[name]
        value = value if place is None else value[place]
        if isinstance(searched, Choice):
            value = str(value)
        elif isinstance(searched, Decay):
            value = 1 - value
        _mark(axes, value, outcome, top, outcome is found)
    if isinstance(searched, (LogUniform, Decay)):
        wide = isinstance(searched, LogUniform) and searched.high / searched.low > 200
        logarithmic(axes, (1.0,) if wide else (1.0, 2.0, 5.0))
    dress(axes, f"1 - {key}" if isinstance(searched, Decay) else key)


def _split(key: str) -> tuple[str, int | None]:
    """``"betas[0]"`` -> ``("betas", 0)``."""
    name, bracket, place = key.removesuffix("]").partition("[")
    return name, int(place) if bracket else None
