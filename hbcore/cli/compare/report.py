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

SCHEMA = "hbcore.compare/1"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


_COLUMNS: tuple[tuple[str, Callable[[Any], str], str], ...] = (
    ("val loss", "{:.4f}".format, "final_val_loss"),
    ("ms/step", "{:.2f}".format, "ms_per_step"),
    ("ms/iteration", "{:.1f}".format, "ms_per_iteration"),
    ("first step", _duration, "first_step_seconds"),
    ("state B/param", "{:.2f}".format, "state_bytes_per_param"),
    ("backend", str, "backend"),
)


def table(runs: Sequence[Run]) -> str:
    """The summaries as text, one row per run in the given order; ``*`` marks the lowest validation loss.

    The row of an incomplete run ends with its status. Partial runs are never marked, because they took fewer steps.
    """
    finals = [run.final_val_loss for run in runs if run.status == "completed" and run.final_val_loss is not None]
    best = min(finals) if len(finals) > 1 else None
    rows = [["optimizer", *(title for title, _, _ in _COLUMNS), ""]]
    for run in runs:
        summary = run.summary()
        cells = ["-" if summary[key] is None else show(summary[key]) for _, show, key in _COLUMNS]
        # Every figure ends in "*" or a space, so that the decimal points are aligned.
        cells[0] += "*" if best is not None and run.status == "completed" and run.final_val_loss == best else " "
        rows.append([run.label, *cells, _remark(run)])
    rows[0][1] += " "
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, len(_COLUMNS), len(_COLUMNS) + 1}  # words; numbers are flush right

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(cells)).rstrip()

    rule = "  ".join("-" * width for width in widths[:-1])
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


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
