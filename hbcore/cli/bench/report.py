"""The tables on the terminal and ``bench.json``."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hbcore.cli.bench.record import Row, baseline
from hbcore.cli.compare import report as compare_report

SCHEMA = "hbcore.bench/1"
_PACKAGES = ("triton", "heavyball", "flashoptim", "schedulefree", "dion", "hb_adam", "hb_muon", "hb_psgd", "hb_soap", "hb_ecc")


def milliseconds(ms: float) -> str:
    """Milliseconds with about three significant digits."""
    return f"{ms:.3f}" if ms < 10 else f"{ms:.2f}" if ms < 100 else f"{ms:.1f}"


Cell = Callable[[Mapping[str, Any]], str]


def _of(key: str, show: Callable[[Any], str]) -> Cell:
    return lambda facts: "-" if facts[key] is None else show(facts[key])


def _range(facts: Mapping[str, Any]) -> str:
    low, high = facts["window_p10_ms"], facts["window_p90_ms"]
    return "-" if low is None else f"{milliseconds(low)}-{milliseconds(high)}"


def _first(facts: Mapping[str, Any]) -> str:
    if facts["first_step"] is None:
        return "-"
    seconds = facts["first_step_cold_seconds"], facts["first_step_warm_seconds"]
    return " / ".join("failed" if s is None else f"{s:.2f}" for s in seconds)


def _check(facts: Mapping[str, Any]) -> str:
    return "-" if facts["check"] is None else f"{facts['check']['parameters']:.1e}"


_COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("window ms", _of("window_ms", milliseconds)),
    ("p10-p90", _range),
    ("x torch", _of("relative", "{:.2f}".format)),
    ("of floor", _of("floor_fraction", "{:.0%}".format)),
    ("still ms", _of("still_ms", milliseconds)),
    ("moving ms", _of("moving_ms", milliseconds)),
    ("host ms", _of("host_ms", milliseconds)),
    ("first s", _first),
    ("state B", _of("state_bytes_per_param", "{:.2f}".format)),
    ("peak B", _of("peak_bytes_per_param", "{:.2f}".format)),
    ("launches", _of("launches", str)),
    ("error", _check),
    ("backend", _of("backend", str)),
)
KEY = """\
window: back-to-back steps, median over windows; still, moving: single synchronized steps, with gradients at the same address
or at a different one each time; host: time until step() returns; of floor: time to move the bytes at copy speed, relative to
window; state, peak: bytes per parameter; error: against float64 after 3 steps."""


def relative_ms(row: Row, base: Row | None) -> float | None:
    """A row's window time relative to its baseline's."""
    own, other = row.summary()["window_ms"], None if base is None else base.summary()["window_ms"]
    return own / other if own is not None and other else None


def grouped(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that share the attributes ``keys``, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, key) for key in keys), []).append(row)
    return groups


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Cells, header first, for rows with the same shapes and dtype. Columns without any figure are omitted."""
    bases = {key: baseline(group) for key, group in grouped(rows, "family").items()}
    facts = []
    for row in rows:
        base = bases[(row.family,)]
        on_torch = base is not None and base.source == "torch"
        facts.append(vars(row) | row.summary() | {"relative": relative_ms(row, base) if on_torch else None})
    columns = [[row.label for row in rows]] + [[cell(f) for f in facts] for _, cell in _COLUMNS]
    titles = ["optimizer", *(title for title, _ in _COLUMNS)]
    kept = [(title, cells) for title, cells in zip(titles, columns, strict=True) if any(cell != "-" for cell in cells)]
    return [list(line) for line in zip(*([title, *cells] for title, cells in kept), strict=True)]


def show(rows: Sequence[Row], *, rich: bool) -> None:
    """Print the table of one shape set at one precision, followed by errors and notes."""
    row = rows[0]
    title = f"{row.shapes}, {row.dtype}: {row.tensors} tensors, {row.parameters:,} parameters"
    lines = table(rows)
    if not (rich and _rich(title, lines)):
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(f"\n{title}")
        for line in lines:
            first, *others = (
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            print("  ".join([first, *others]).rstrip())
    for one in rows:
        for text in ([f"failed: {one.error}"] if one.error else []) + one.notes:
            print(f"  {one.label}: {text}")
    sys.stdout.flush()


def _rich(title: str, lines: Sequence[Sequence[str]]) -> bool:
    """Print with rich; False if it is not installed or would wrap figures."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(lines[0]):
        drawn.add_column(name, justify="right" if i else "left", no_wrap=i == 0)
    for line in lines[1:]:
        drawn.add_row(*map(escape, line))
    console = Console()
    if drawn.__rich_measure__(console, console.options.update(width=10_000)).maximum > console.width:
        return False
    print()
    console.print(drawn)
    return True


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that the numbers depend on besides the arguments."""
    facts = compare_report.environment(device) | {
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def document(rows: Sequence[Row], **sections: Any) -> dict[str, Any]:
    """The content of ``bench.json``: every window and single step, and the medians shown in the tables."""
    content = {"schema": SCHEMA, **sections, "rows": [vars(row) | {"summary": row.summary()} for row in rows]}
    # A round trip turns infinity and NaN into null, and other objects into their repr.
    plain: dict[str, Any] = json.loads(json.dumps(content, default=repr), parse_constant=lambda _: None)
    return plain


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write ``content`` to ``path`` atomically, so that a killed run keeps its earlier rows. Raises OSError."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
