"""The table on the terminal and ``compare.json``."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import hbcore
from hbcore.cli.compare.groups import Group, grouped, lowest, shown_loss
from hbcore.cli.compare.record import Run, Step, Validation
from hbcore.cli.text import wrapped

SCHEMA = "hbcore.compare/1"
UNIT = "nats per byte"  # of the built-in model on a text


def duration(seconds: float) -> str:
    """Seconds or milliseconds, with their unit."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


_COLUMNS: tuple[tuple[str, Callable[[Any], str], str], ...] = (
    ("lr", "{:g}".format, "lr"),
    ("val loss", "{:.4f}".format, "final_val_loss"),
    ("ms/step", "{:.2f}".format, "ms_per_step"),
    ("state B/param", "{:.2f}".format, "state_bytes_per_param"),
    ("ms/iteration", "{:.1f}".format, "ms_per_iteration"),
    ("first step", duration, "first_step_seconds"),
    ("backend", str, "backend"),
)
_COUNT: tuple[tuple[str, Callable[[Any], str], str], ...] = (("n", str, "n"),)
LOSS = 2  # the column of the validation loss
FEWEST = 3  # columns that a narrow terminal keeps


def table(runs: Sequence[Run], columns: int | None = None, unit: str = UNIT) -> str:
    """The summaries as text, one row per label in the given order; ``*`` marks the lowest validation loss.

    Of several seeds, figures are means, the loss has its standard deviation, and a column ``n`` the number of complete runs.
    The row of an incomplete run ends with its status. Partial runs are never marked, because they took fewer steps.

    Args:
        runs: the records, complete or not.
        columns: the width to fit; the last figures are left out if they do not. None for any.
        unit: of the losses; empty if nobody knows.
    """
    groups = grouped(runs)
    figures = [*_COLUMNS, *(_COUNT if any(len(group.runs) > 1 for group in groups) else ())]
    best = lowest(groups)
    rows = [["optimizer", *(title for title, _, _ in figures), ""]]
    for group in groups:
        summary = group.summary()
        cells = ["-" if summary[key] is None else show(summary[key]) for _, show, key in figures]
        rows.append([group.label, *cells, group.remark])
        # Every figure ends in "*" or a space, so that the decimal points are aligned.
        rows[-1][LOSS] = shown_loss(group) + (
            "*" if best is not None and group.loss is not None and group.loss.mean == best else " "
        )
    rows[0][LOSS] += " "
    shown = len(figures)
    while columns is not None and shown > FEWEST and max(map(len, _aligned(rows, shown))) > columns:
        shown -= 1
    lines = _aligned(rows, shown)
    notes = [_explained(groups, unit, best is not None)]
    if omitted := [title for title, _, _ in figures[shown:]]:
        notes.append(f"no room for {', '.join(omitted)}: see compare.json")
    return "\n".join([*lines, "", *(line for note in [*notes, *_trials(runs)] for line in wrapped(note, columns, rest="  "))])


def _explained(groups: Sequence[Group], unit: str, marked: bool) -> str:
    note = f"val loss: {unit}{', ' if unit else ''}lower is better"
    if any(len(group.runs) > 1 for group in groups):
        note += "; mean ± standard deviation over n seeds"
    return note + ("; * marks the lowest" if marked else "")


def _aligned(rows: Sequence[Sequence[str]], shown: int) -> list[str]:
    """The header, a rule and the rows, with the first ``shown`` figures and the remark."""
    kept = [[*row[: shown + 1], row[-1]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    words = {0, kept[0].index("backend") if "backend" in kept[0] else 0, shown + 1}  # numbers are flush right

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(w) if i in words else cell.rjust(w) for i, (cell, w) in enumerate(cells)).rstrip()

    rule = "  ".join("-" * width for width in widths[:-1])
    return [line(kept[0]), rule, *map(line, kept[1:])]


def _trials(runs: Sequence[Run]) -> list[str]:
    """A line for each run that was tuned: every learning rate that was tried, with its loss."""
    lines = []
    for run in runs:
        tried = (f"{t.lr:g}: {'diverged' if t.loss is None else format(t.loss, '.3f')}" for t in run.trials)
        lines += [f"lr of {run.label}, tried in short runs: {', '.join(tried)}"] if run.trials else []
    return lines


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that the numbers depend on besides the arguments."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "hbcore": hbcore.__version__,
        "platform": platform.system(),
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


def plain(value: Any) -> Any:
    """``value`` as JSON types. NaN and infinity become null; other objects become their repr."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, str)) else repr(value)


def entry(run: Run) -> dict[str, Any]:
    """One run of ``compare.json``."""
    return {
        "label": run.label,
        "optimizer": run.optimizer,
        "seed": run.seed,
        "kwargs": run.kwargs,
        "lr": run.lr,
        "lr_from": run.lr_from,
        "trials": [trial._asdict() for trial in run.trials],
        "status": run.status,
        "completed": run.status == "completed",
        "error": run.error,
        "summary": run.summary(),
        "train": {name: [getattr(step, name) for step in run.steps] for name in Step._fields},
        "validation": {name: [getattr(point, name) for point in run.validations] for name in Validation._fields},
        "norms": {
            "step": [at.step for at in run.norms],
            "update_rms": {name: [at.update_rms[i] for at in run.norms] for i, name in enumerate(run.norm_names)},
            "weight_rms": {name: [at.weight_rms[i] for at in run.norms] for i, name in enumerate(run.norm_names)},
        },
        "resumed": run.resumed,
        "constructor_seconds": run.constructor_seconds,
    }


def document(runs: Sequence[Run], *, command: str, args: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """The content of ``compare.json``: plain data.

    Args:
        runs: the records, complete or not.
        command: the shell command that repeats the comparison.
        args: the parsed arguments.
        sections: further objects to include (``model``, ``data``, ``environment``).
    """
    content = {
        "schema": SCHEMA,
        "command": command,
        "args": args,
        **sections,
        "summaries": [{"label": group.label, **group.summary(), "remark": group.remark} for group in grouped(runs)],
        "runs": [entry(run) for run in runs],
    }
    return plain(content)  # type: ignore[no-any-return]


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write ``content`` to ``path`` as UTF-8, all of it or nothing. Raises OSError if that fails."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` once it is complete: a process killed meanwhile leaves the old one."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
