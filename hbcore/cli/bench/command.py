"""Runs ``hbcore bench``, from parsed arguments to exit status."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hbcore.cli.bench import report
from hbcore.cli.bench.accuracy import LARGEST, check
from hbcore.cli.bench.ceilings import measure_ceilings
from hbcore.cli.bench.contenders import PRECISIONS, Contender, Precision, from_entries, try_out
from hbcore.cli.bench.first_step import measure_first_step
from hbcore.cli.bench.measure import Bench, Pace
from hbcore.cli.bench.peers import find_peers
from hbcore.cli.bench.record import Row
from hbcore.cli.bench.shapes import Shape, count, shapes_of
from hbcore.cli.compare.options import parse_entries
from hbcore.cli.compare.progress import PIP_LINE
from hbcore.errors import OptionError

DEFAULT_SHAPES = ("gpt2",)
_LISTS = ("shapes", "dtypes", "peers", "compile")
_VALUES = ("windows", "steps", "warmup", "singles", "device", "threads", "core", "seed", "first_step_timeout", "out")
_SWITCHES = ("quick", "first_step", "check")
_METHOD = (
    "gradients are noise of the parameters' dtype; consume_grad=False where available, because every step of a window uses the "
    "same gradient tensors; contenders are interleaved in one process; Python's garbage collector is off while timing"
)


@dataclass(frozen=True)
class Job:
    """The parsed arguments, with every name resolved."""

    ours: list[Contender]
    peers: list[Contender]
    notes: list[str]
    sets: dict[str, list[Shape]]
    precisions: list[Precision]
    device: torch.device
    pace: Pace
    out: Path

    def contenders(self, shapes: str) -> list[Contender]:
        """The contenders in a shape set, hbcore's first."""
        return [one for one in [*self.ours, *self.peers] if not one.only or shapes in one.only]


def bench(args: argparse.Namespace) -> int:
    """See :func:`hbcore.cli.bench.run`."""
    job = _prepare(args)
    for note in job.notes:
        _say(note)
    ceilings = measure_ceilings(job.device, quick=args.quick)
    copy, flops = ceilings["copy_bytes_per_second"], ceilings["matmul_flops_per_second"]
    _say(f"copy {copy / 1e9:.1f} GB/s (read plus write), {ceilings['matmul_dtype']} matmul {flops / 1e12:.3g} TFLOP/s")
    rows: list[Row] = []
    facts: dict[str, Any] = {
        "command": command_line(args),
        "method": _METHOD,
        "notes": job.notes,
        "environment": report.environment(job.device),
        "pace": vars(job.pace),
        "ceilings": ceilings,
    }
    for precision in job.precisions:
        for name, shapes in job.sets.items():
            measured = _one_set(args, job, name, shapes, precision)
            for row in measured:
                row.floor_at(copy)
            rows += measured
            report.show(measured, rich=sys.stdout.isatty())
            report.write_json(report.document(rows, **facts), job.out / "bench.json")
    print(f"\n{report.KEY}\n\nwrote {job.out / 'bench.json'}")
    _draw(rows, facts["environment"], ceilings, job.out / "bench.png")
    return 1 if any(row.status == "failed" and row.source == "hbcore" for row in rows) else 0


def _prepare(args: argparse.Namespace) -> Job:
    """Resolve everything before the first measurement. Raises HbcoreError."""
    device = _device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = [*(DEFAULT_SHAPES if args.shapes is None and not args.model else args.shapes or ()), *args.model]
    if not names:
        raise OptionError("--shapes: no shape set to measure")
    unknown = [name for name in args.dtypes if name not in PRECISIONS]
    if unknown or not args.dtypes:
        raise OptionError(f"--dtypes: expected some of {', '.join(PRECISIONS)}, got {', '.join(unknown) or 'none'}")
    precisions = [PRECISIONS[name] for name in args.dtypes]
    ours = from_entries(parse_entries(args.optimizers, args.optimizer_args), args.compile)
    try_out(ours, precisions)
    peers, notes = find_peers(args.peers, ours)
    sets = {name: shapes_of(name) for name in names}
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out {args.out}: {error.strerror or error}") from error
    _pin(args.core)
    pace = Pace(args.windows, args.steps, args.warmup, args.singles)
    if args.quick:
        pace = Pace(min(args.windows, 2), min(args.steps, 2), 1, min(args.singles, 3))
    return Job(ours, peers, notes, sets, precisions, device, pace, out)


def _pin(core: int | None) -> None:
    """Pin the process to a core. Raises OptionError if there is no such core."""
    if core is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise OptionError("--core needs an operating system that can pin processes, such as Linux; omit it.")
    usable = sorted(os.sched_getaffinity(0))
    if core not in usable:
        raise OptionError(f"--core {core}: this process may use the cores {', '.join(map(str, usable))}")
    os.sched_setaffinity(0, {core})


def _device(text: str | None) -> torch.device:
    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # a well-formed name may still be a device that does not work
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # events and memory counters belong to the current device
    except Exception as error:  # each backend raises its own type
        raise OptionError(f"--device {text}: {str(error).strip().splitlines()[0]}") from error
    return device


def _one_set(args: argparse.Namespace, job: Job, name: str, shapes: Sequence[Shape], precision: Precision) -> list[Row]:
    """Measure one shape set at one precision."""
    contenders = job.contenders(name)
    rows = Bench(job.device, job.pace, args.seed, _say).measure(name, shapes, precision, contenders)
    pairs = list(zip(contenders, rows, strict=True))
    if precision.name == "bf16+fp32state":
        for row in rows:
            if row.source in ("torch", "flashoptim"):
                row.notes.append("chooses the dtype of its state itself, as with bf16")
    if args.check and count(shapes) <= LARGEST:
        check(pairs, job.ours, shapes, precision, job.device, args.seed)
    if args.first_step:
        for one, row in pairs:
            _say(f"{name} {precision.name}: {one.label}: first step in fresh processes")
            row.first_step = measure_first_step(
                one, name, precision, str(job.device), threads=args.threads, timeout=args.first_step_timeout
            )
            row.notes += [f"first step, {kind}: {r['error']}" for kind, r in row.first_step.items() if "error" in r]
    return rows


def _say(text: str) -> None:
    """Print progress to stderr; stdout is for the tables."""
    print(f"hbcore bench: {text}", file=sys.stderr, flush=True)


def command_line(args: argparse.Namespace) -> str:
    """The shell command that repeats this run."""
    words = ["hbcore", "bench", *args.optimizers]
    if args.optimizer_args:
        words += ["--optimizer-args", *args.optimizer_args]
    for name in _LISTS:
        if (values := getattr(args, name)) is not None:
            words += ["--" + name, ",".join(values) or "none"]
    for model in args.model:
        words += ["--model", model]
    for name in _VALUES:
        if (value := getattr(args, name)) is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    words += ["--" + name.replace("_", "-") for name in _SWITCHES if getattr(args, name)]
    return shlex.join(words)


def _draw(rows: Sequence[Row], environment: dict[str, Any], ceilings: dict[str, Any], path: Path) -> None:
    try:
        from hbcore.cli.bench import chart

        device = environment["cpu"] if environment["device"] == "cpu" else environment["device_name"]
        threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
        copy = ceilings["copy_bytes_per_second"] / 1e9
        chart.draw(
            rows,
            "Optimizer steps, back to back",
            f"{device}{threads}, torch {environment['torch']}; copies {copy:,.0f} GB/s; figures are ms, lower is better",
            path,
        )
    except ImportError:
        print(f"no plot: matplotlib is not installed ({PIP_LINE})", file=sys.stderr)
    else:
        if path.exists():
            print(f"wrote {path}")
