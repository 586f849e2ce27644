"""The table on the terminal and ``compare.json``."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import hbcore
from hbcore.cli.compare.record import Run, Step, Validation
from hbcore.cli.text import wrapped

SCHEMA = "hbcore.compare/1"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


_COLUMNS: tuple[tuple[str, Callable[[Any], str], str], ...] = (
    ("lr", "{:g}".format, "lr"),
    ("val loss", "{:.4f}".format, "final_val_loss"),
    ("ms/step", "{:.2f}".format, "ms_per_step"),
    ("state B/param", "{:.2f}".format, "state_bytes_per_param"),
    ("ms/iteration", "{:.1f}".format, "ms_per_iteration"),
    ("first step", _duration, "first_step_seconds"),
    ("backend", str, "backend"),
)
LOSS = 2  # the column of the validation loss
FEWEST = 3  # columns that a narrow terminal keeps


def table(runs: Sequence[Run], columns: int | None = None) -> str:
    """The summaries as text, one row per run in the given order; ``*`` marks the lowest validation loss.

    The row of an incomplete run ends with its status. Partial runs are never marked, because they took fewer steps.

    Args:
        runs: the records, complete or not.
        columns: the width to fit; the last figures are left out if they do not. None for any.
    """
    finals = [run.final_val_loss for run in runs if run.status == "completed" and run.final_val_loss is not None]
    best = min(finals) if len(finals) > 1 else None
    rows = [["optimizer", *(title for title, _, _ in _COLUMNS), ""]]
    for run in runs:
        summary = run.summary()
        cells = ["-" if summary[key] is None else show(summary[key]) for _, show, key in _COLUMNS]
        rows.append([run.label, *cells, _remark(run)])
        # Every figure ends in "*" or a space, so that the decimal points are aligned.
        rows[-1][LOSS] += "*" if best is not None and run.status == "completed" and run.final_val_loss == best else " "
    rows[0][LOSS] += " "
    shown = len(_COLUMNS)
    while columns is not None and shown > FEWEST and max(map(len, _aligned(rows, shown))) > columns:
        shown -= 1
    lines = _aligned(rows, shown)
    notes = ["val loss: nats per byte, lower is better"]
    if best is not None:
        notes[0] += "; * marks the lowest"
    if omitted := [title for title, _, _ in _COLUMNS[shown:]]:
        notes.append(f"no room for {', '.join(omitted)}: see compare.json")
    return "\n".join([*lines, "", *(line for note in [*notes, *_trials(runs)] for line in wrapped(note, columns, rest="  "))])


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


def _remark(run: Run) -> str:
    if run.status == "completed":
        return ""
    return "failed" if run.status == "failed" else f"{run.status}, step {len(run.steps)}"


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


def _plain(value: Any) -> Any:
    """``value`` as JSON types. NaN and infinity become null; other objects become their repr."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, str)) else repr(value)


def _entry(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "optimizer": run.optimizer,
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
    }


def document(runs: Sequence[Run], *, command: str, args: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """The content of ``compare.json``: plain data.

    Args:
        runs: the records, complete or not.
        command: the shell command that repeats the comparison.
        args: the parsed arguments.
        sections: further objects to include (``model``, ``data``, ``environment``).
    """
    content = {"schema": SCHEMA, "command": command, "args": args, **sections, "runs": [_entry(run) for run in runs]}
    return _plain(content)  # type: ignore[no-any-return]


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write ``content`` to ``path`` as UTF-8. Raises OSError if that fails."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
