"""The table and the picture of a study; see README.md.

python benchmarks/convergence/table.py result.json [--picture curve.png]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

REFERENCE = "AdamW"


class Row(NamedTuple):
    """One optimizer's figures over the seeds that count; ``steps`` is None where AdamW's loss is not reached."""

    name: str
    loss: float
    sigma: float
    n: int
    lr: float
    weight_decay: float
    steps: float | None
    ms: float
    curve: list[tuple[int, float]]

    @property
    def seconds(self) -> float | None:
        """Until AdamW's loss."""
        return None if self.steps is None else self.steps * self.ms / 1e3


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The rows, the lowest loss first; a run that diverged counts as an infinite loss."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        if run["seed"] != 0:
            by_name.setdefault(run["name"], []).append(run)
    target = statistics.mean(run["loss"] for run in by_name[REFERENCE])
    rows = []
    for name, runs in by_name.items():
        losses = [run["loss"] if math.isfinite(run["loss"]) else math.inf for run in runs]
        mean, sound = statistics.mean(losses), all(map(math.isfinite, losses))
        curve = mean_curve([run["curve"] for run in runs]) if sound else []
        sigma = statistics.stdev(losses) if sound else math.nan
        ms = result["ms_per_step"].get(name, math.nan)
        lr, decay = runs[0]["lr"], runs[0]["weight_decay"]
        rows.append(Row(name, mean, sigma, len(runs), lr, decay, crossing(curve, target), ms, curve))
    return sorted(rows, key=lambda row: row.loss)


def mean_curve(curves: list[list[list[float]]]) -> list[tuple[int, float]]:
    """The mean of curves that have the same steps."""
    return [(int(points[0][0]), statistics.mean(loss for _, loss in points)) for points in zip(*curves, strict=True)]


def crossing(curve: list[tuple[int, float]], target: float) -> float | None:
    """The step where a curve first is at ``target``, between two of its points on a line; None if it never is."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low) if high > target else before
    return None


def markdown(rows: list[Row]) -> str:
    """The table for people."""
    reference = next(row for row in rows if row.name == REFERENCE)
    assert reference.steps is not None and reference.seconds is not None
    lines = [
        "| optimizer | held-out loss | lr | weight decay | ms a step | steps to AdamW's loss | seconds to it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        to = ["not reached", "not reached"]
        if row.steps is not None and row.seconds is not None:
            shares = (row.steps / reference.steps, row.seconds / reference.seconds)
            to = [f"{row.steps:.0f} ({shares[0]:.2f})", f"{row.seconds:.1f} ({shares[1]:.2f})"]
        loss = f"{row.loss:.4f} ± {row.sigma:.4f} (n={row.n})" if math.isfinite(row.loss) else f"diverged (n={row.n})"
        lines.append(f"| `{row.name}` | {loss} | {row.lr:.2g} | {row.weight_decay:.2g} | {row.ms:.1f} | {to[0]} | {to[1]} |")
    return "\n".join(lines)


def draw(rows: list[Row], file: Path) -> None:
    """Held-out loss against steps, and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for i, row in enumerate(row for row in rows if row.curve):
        width = 2.4 if row.name == REFERENCE else 1.3
        for ax, scale in zip(axes, (1.0, row.ms / 1e3), strict=True):
            ax.plot(
                [s * scale for s, _ in row.curve], [v for _, v in row.curve], color=colours(i % 20), lw=width, label=row.name
            )
    low, high = min(row.loss for row in rows), next(row for row in rows if row.name == REFERENCE).curve
    axes[0].set(xlabel="step", ylabel="held-out loss, nats per byte", ylim=(low - 0.03, high[min(4, len(high) - 1)][1] + 0.1))
    axes[1].set(xlabel="seconds")
    axes[0].legend(fontsize=8, ncols=2, frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Print the table, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("result", type=Path)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    rows = rows_of(json.loads(given.result.read_text()))
    print(markdown(rows))
    if given.picture:
        draw(rows, given.picture)


if __name__ == "__main__":
    main()
