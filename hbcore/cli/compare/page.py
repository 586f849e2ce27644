"""Writes ``report.html``: one file with everything in it, which needs no network and no script."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hbcore.cli.compare.curves import Curve, limits
from hbcore.cli.compare.groups import Group, averaged, grouped, lowest, shown_loss
from hbcore.cli.compare.record import Norms, Run
from hbcore.cli.compare.report import duration, replacing
from hbcore.cli.compare.style import sheet
from hbcore.cli.compare.svg import Axis, Chart, Line

MOST_PARAMETERS = 60  # that get charts; compare.json has all


def write(runs: Sequence[Run], title: str, subtitle: str, command: str, unit: str, path: Path) -> None:
    """Write the page: the table, losses, memory, time to the first step, and the sizes of updates and weights.

    Raises:
        OSError: ``path`` cannot be written.
    """
    groups = grouped(runs)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(subtitle)}</p>',
        _key(groups),
        _table(groups, unit),
        "<h2>Loss</h2>",
        _losses(groups, unit),
        "<h2>Memory and the first step</h2>",
        _costs(groups),
        _norms(groups),
        f"<h2>The command</h2><code>{escape(command)}</code>",
    ]
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{sheet()}</style>
</head>
<body>
{chr(10).join(part for part in parts if part)}
</body>
</html>
"""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _key(groups: Sequence[Group]) -> str:
    lines = (
        f'<span><svg viewBox="0 0 26 10"><line class="line s{i % 7} d{i // 7 % 3}" x1="0" y1="5" x2="26" y2="5"/></svg>'
        f"{escape(group.label)}</span>"
        for i, group in enumerate(groups)
    )
    return f'<div class="key">{"".join(lines)}</div>'


def _table(groups: Sequence[Group], unit: str) -> str:
    several = any(len(group.runs) > 1 for group in groups)
    titles = ["optimizer", "lr", f"val loss{f', {unit}' if unit else ''}", *(["n"] if several else [])]
    counted = any(group.summary()["peak_bytes"] is not None for group in groups)
    titles += ["ms/step", "ms/iteration", "first step", "state B/param", *(["peak memory"] if counted else []), "backend", ""]
    best, rows = lowest(groups), []
    for group in groups:
        known = group.summary()

        def cell(key: str, show: Callable[[float], str], known: dict[str, float | None] = known) -> str:
            value = known[key]
            return "-" if value is None else escape(show(value))

        mark = ' class="best"' if group.loss is not None and group.loss.mean == best else ""
        cells = [escape(group.label), cell("lr", "{:g}".format), escape(shown_loss(group))]
        cells += [cell("n", str)] if several else []
        cells += [cell("ms_per_step", "{:.2f}".format), cell("ms_per_iteration", "{:.1f}".format)]
        cells += [cell("first_step_seconds", duration), cell("state_bytes_per_param", "{:.2f}".format)]
        cells += [cell("peak_bytes", size)] if counted else []
        cells += [cell("backend", str), escape(group.remark)]
        rows.append(f"<tr{mark}>" + "".join(f"<td>{each}</td>" for each in cells) + "</tr>")
    head = "".join(f"<th>{escape(each)}</th>" for each in titles)
    note = "Lower loss is better; the lowest is bold." + (" Losses: mean ± standard deviation over n seeds." if several else "")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div><p class="faint">{note}</p>'


def _losses(groups: Sequence[Group], unit: str) -> str:
    span, figures = limits(groups), []
    for seconds, label in ((False, "steps"), (True, "seconds of training, log scale")):
        curves = [Curve.of(group, i, seconds) for i, group in enumerate(groups) if group.shown[0].steps]
        lines = [Line(c.group.label, c.index, c.x, c.y, c.sigmas, c.points) for c in curves]
        title = f"loss{f' ({unit})' if unit else ''} over {'seconds' if seconds else 'steps'}"
        figures.append(Chart(title, lines, Axis(label, log=seconds), Axis(span=span)).svg())
    bands = " Bands: one standard deviation." if any(len(group.complete) > 1 for group in groups) else ""
    note = f"Lines: training loss, smoothed. Points: validation loss.{bands} Seconds include compiling, but not validation."
    return f'<div class="two">{_figures(figures)}</div><p class="faint">{note}</p>'


def _costs(groups: Sequence[Group]) -> str:
    known = [group.summary() for group in groups]
    parts = [
        _bars("state, bytes per parameter", groups, [each["state_bytes_per_param"] for each in known], "{:.2f}".format),
        _bars("peak device memory of an iteration", groups, [each["peak_bytes"] for each in known], size),
        _bars(
            "constructor and first step, compiling included", groups, [each["first_step_seconds"] for each in known], duration
        ),
    ]
    return f'<div class="two">{"".join(parts)}</div>'


def _bars(title: str, groups: Sequence[Group], values: Sequence[float | None], show: Callable[[float], str]) -> str:
    largest = max((value for value in values if value is not None), default=None)
    if largest is None:
        return ""
    rows = []
    for i, (group, value) in enumerate(zip(groups, values, strict=True)):
        share = 0.0 if not value or not largest else 100 * value / largest
        bar = f'<div><div class="bar s{i % 7}" style="width: {share:.1f}%"></div></div>'
        rows.append(f"<span>{escape(group.label)}</span>{bar}<span>{'-' if value is None else escape(show(value))}</span>")
    return f'<figure><p class="title">{escape(title)}</p><div class="bars">{"".join(rows)}</div></figure>'


@dataclass(frozen=True)
class _Quantity:
    title: str
    of: Callable[[Norms, int], float]


_QUANTITIES = (
    _Quantity("update RMS over weight RMS", lambda at, i: at.update_rms[i] / at.weight_rms[i] if at.weight_rms[i] else 0.0),
    _Quantity("update RMS", lambda at, i: at.update_rms[i]),
    _Quantity("weight RMS", lambda at, i: at.weight_rms[i]),
)


def _norms(groups: Sequence[Group]) -> str:
    """A small chart per parameter, for each quantity; the first is open."""
    names = next((run.norm_names for group in groups for run in group.shown if run.norms), [])
    if not names:
        return ""
    parts = ["<h2>Updates and weights of each parameter</h2>"]
    note = "What a step added to a parameter, and the weights before that step, as root mean squares; log scales."
    more = len(names) - MOST_PARAMETERS
    note += f" The first {MOST_PARAMETERS} parameters; compare.json has the other {more}." if more > 0 else ""
    parts.append(f'<p class="faint">{note}</p>')
    for number, quantity in enumerate(_QUANTITIES):
        figures = [_small(groups, quantity, name, i) for i, name in enumerate(names[:MOST_PARAMETERS])]
        opened = "" if number else " open"
        inside = f'<div class="many">{_figures(figures)}</div>'
        parts.append(f"<details{opened}><summary>{quantity.title}</summary>{inside}</details>")
    return "".join(parts)


def _small(groups: Sequence[Group], quantity: _Quantity, name: str, i: int) -> str:
    lines = []
    for index, group in enumerate(groups):
        columns = [[quantity.of(at, i) for at in run.norms] for run in group.shown]
        steps = max(([float(at.step) for at in run.norms] for run in group.shown), key=len)
        lines.append(Line(group.label, index, steps, averaged(columns, statistics.fmean)))
    return Chart(name, lines, Axis("steps"), Axis(log=True), width=320, height=190).svg()


def _figures(charts: Sequence[str]) -> str:
    return "".join(f"<figure>{chart}</figure>" for chart in charts)


def size(count: float) -> str:
    """Bytes in units of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
