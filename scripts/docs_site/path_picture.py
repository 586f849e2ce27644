"""The picture of an optimizer's path, and the words under it."""

from __future__ import annotations

from typing import Any

import numpy
import torch

from docs_site import drawing
from docs_site.trajectories import LAST, LEARNING_RATES, STARTS, STEPS, Path, valley
from hbcore.registry import OptimizerSpec

ACROSS, UP = (-2.1, 2.1), (-1.4, 2.9)
LEVELS = (0.1, 0.5, 2, 6, 16, 40, 90)


def draw(name: str, path: Path) -> str:
    """The contours of the function and the path of each row, as an SVG element."""
    with drawing.figure(5.6, 3.9) as (shown, axes):
        x, y = numpy.meshgrid(numpy.linspace(*ACROSS, 160), numpy.linspace(*UP, 160))
        height = valley(torch.stack([torch.from_numpy(x), torch.from_numpy(y)], -1)).numpy()
        axes.contour(x, y, height, LEVELS, colors=drawing.FAINT, linewidths=0.8)
        axes.plot([1], [1], marker="x", color=drawing.INK, markersize=8, linestyle="none")
        for row, colour in zip(range(path.points.shape[1]), (drawing.FIRST, drawing.SECOND), strict=False):
            _line(axes, path.points[:, row].numpy(), colour)
        axes.set(xlim=ACROSS, ylim=UP, xlabel="x", ylabel="y")
        return drawing.svg(shown, name, f"The path of {name} through the contours of a curved valley")


def _line(axes: Any, points: Any, colour: str) -> None:
    axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=1.3, marker="o", markersize=2.2)
    axes.plot(points[:1, 0], points[:1, 1], color=colour, marker="o", markersize=6)


def caption(spec: OptimizerSpec, path: Path) -> str:
    """What the picture shows, as Markdown."""
    rows = path.points.shape[1]
    starts = " and ".join(f"({x:g}, {y:g})" for x, y in STARTS[:rows])
    ends = " and ".join(f"{value:.2g}" for value in path.values[-1].tolist())
    return " ".join(
        filter(
            None,
            [
                f"{STEPS} steps through a curved valley, from {starts} towards its minimum at the cross.",
                "The parameter is a 2 x 2 matrix, as this rule is for matrices, and each of its rows is a point."
                if rows == 2
                else "",
                "The weights are those of `optimizer.eval()`." if "modes" in spec.capabilities else "",
                f"The learning rate is {path.lr:g}, and the function's value at the end {ends}.",
                "[How the pictures are made](index.md#paths).",
            ],
        )
    )


def explanation() -> str:
    """How all pictures are made, as Markdown."""
    rates = ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
    return (
        "The page of each optimizer has a picture of its path on \\((1 - x)^2 + 10 (y - x^2)^2\\), Rosenbrock's valley with "
        "milder slopes. Its minimum is 0, at the cross. Most rules get a vector of two elements. Those for matrices get a "
        "2 x 2 matrix whose rows are two points: the loss is the sum of their values, and the rule sees both rows at once. All "
        f"options are at their defaults, but for the learning rate: of {rates}, the one with the lowest mean over the last "
        f"{LAST} of {STEPS} steps. Two variables without noise show how a rule moves, and not how well it trains a model."
    )
