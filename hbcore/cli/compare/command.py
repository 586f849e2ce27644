"""Runs ``hbcore compare``, from parsed arguments to exit status."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hbcore.cli import text
from hbcore.cli.compare import page, rates, report, resume
from hbcore.cli.compare.options import parse_entries
from hbcore.cli.compare.progress import PIP_LINE, Display, make_display
from hbcore.cli.compare.record import Run
from hbcore.cli.compare.setup import Job, Resolver, build_jobs, output_folder, prepare
from hbcore.cli.compare.task import Task
from hbcore.cli.compare.train import Hooks, train
from hbcore.errors import HbcoreError

_OPTIONS = (
    *("steps", "model_size", "model", "data", "device", "seed", "seeds", "batch_size", "eval_every", "norms_every"),
    *("threads", "out", "tune"),
)
_SWITCHES = ("default_lr",)
RAISED, UNUSABLE, INTERRUPTED = 1, 2, 130  # exit statuses; shells use 130 for Ctrl-C


def compare(args: argparse.Namespace, resolve: Resolver | None = None) -> int:
    """See :func:`hbcore.cli.compare.run`."""
    try:
        entries = parse_entries(args.optimizers, args.optimizer_args)
        out = output_folder(args.out)
        task = prepare(args)
        jobs = build_jobs(entries, args, task, resolve)
        task.warm_up()
        checkpoint = _checkpoint(jobs, args, task, out)
    except HbcoreError as error:
        return refuse("compare", error)
    print(f"{title(args, task)}: {_subtitle(args, task)}", flush=True)
    runs = [job.run for job in jobs]
    write = partial(_write_numbers, runs, args, task, out)
    write()  # now, so that what is there is of this comparison
    interrupted = _train_all(jobs, args.tune, checkpoint, write)
    runs = [run for run in runs if run.status != "pending"]  # omit runs that Ctrl-C prevented
    print(f"\n{report.table(runs, text.width(), task.unit)}\n")
    _write(runs, args, task, out)
    if interrupted:
        return INTERRUPTED
    return RAISED if any(run.status == "failed" for run in runs) else 0


def refuse(command: str, error: HbcoreError) -> int:
    """Print the error on one line, whatever a plugin's message contains; the exit status."""
    print(f"hbcore {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return UNUSABLE


def _checkpoint(jobs: Sequence[Job], args: argparse.Namespace, task: Task, out: Path) -> resume.Checkpoint:
    """Where unfinished runs are kept; with ``--resume``, finished ones are filled in."""
    identity = _identity(args, task)
    checkpoint = resume.Checkpoint(out / resume.NAME, identity)
    if args.resume:
        resume.restore([job.run for job in jobs], resume.read(out, identity), args.tune is not None, out)
    else:
        checkpoint.discard()
    return checkpoint


def _identity(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    return {**task.identity(), "tune": args.tune}


def _train_all(jobs: Sequence[Job], tune: int | None, checkpoint: resume.Checkpoint, write: Callable[[], None]) -> bool:
    """Train all runs in order; True if Ctrl-C interrupted them. An optimizer that raises fails only its own run."""
    tuned: dict[str, float] = {}
    with make_display([job.name for job in jobs], jobs[0].task.steps, sys.stdout) as display:
        for job in jobs:
            run, resumed = job.run, job.run.finished
            display.start(job.name)
            try:
                if not resumed:
                    _train(job, tune, tuned, checkpoint, display)
                if run.lr_from == "tuned" and run.lr is not None:
                    tuned[run.label] = run.lr
            except KeyboardInterrupt:
                display.finish(run)
                return True
            except BrokenPipeError:
                raise  # the reader of our output has exited (`| head`), which is not the optimizer's fault
            except Exception as error:
                run.status, run.error = "failed", f"{type(error).__name__}: {error}"
                traceback.print_exc()
            display.finish(run)
            if not resumed:  # else the file may be of a later run
                write()
                checkpoint.discard()
    return False


def _train(job: Job, tune: int | None, tuned: dict[str, float], checkpoint: resume.Checkpoint, display: Display) -> None:
    """Train one run, from where it was interrupted if it was. ``tuned`` has the learning rates found with the first seed."""
    run: Run = job.run
    factory: Callable[..., torch.optim.Optimizer] = job.factory
    saved = checkpoint.load(run)
    if saved is not None:
        display.say(f"goes on after step {saved['done']}")
    elif run.label in tuned:
        run.lr, run.lr_from = tuned[run.label], "tuned"
    elif tune:
        factory = rates.tune(factory, job.task, run, tune, display.say)
    if run.lr_from == "tuned":
        factory = partial(factory, lr=run.lr)
    train(factory, job.task, run, Hooks(step=display.update, save=partial(checkpoint.save, run)), saved)


def title(args: argparse.Namespace, task: Task) -> str:
    """What is trained, and how large it is."""
    size = f"{task.num_parameters / 1e6:.2f} M parameters"
    return f"{task.source.name} ({args.model_size + ', ' if args.model is None else ''}{size})"


def _subtitle(args: argparse.Namespace, task: Task) -> str:
    size = f" ({task.data.size})" if task.data.size else ""
    context = getattr(task.data, "context", None)
    batch = f"{task.batch_size} x {context} bytes" if context else f"batch size {task.batch_size}"
    seeds = f"seed {task.seed}" if args.seeds == 1 else f"seeds {task.seed} to {task.seed + args.seeds - 1}"
    return f"{task.data.name}{size}, {task.steps} steps of {batch}, {seeds}, {task.device}"


def command_line(args: argparse.Namespace) -> str:
    """The shell command that repeats this comparison."""
    words = ["hbcore", "compare", *args.optimizers]
    if args.optimizer_args:
        words += ["--optimizer-args", *args.optimizer_args]
    for name in _OPTIONS:
        if (value := getattr(args, name)) is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    words += ["--" + name.replace("_", "-") for name in _SWITCHES if getattr(args, name)]
    return shlex.join(words)


def sections(task: Task) -> dict[str, Any]:
    """What a report says of model, data and machine."""
    return {
        "model": {"name": task.source.name, "parameters": task.num_parameters, **task.source.facts},
        "data": task.data.facts,
        "environment": report.environment(task.device),
    }


def _document(runs: Sequence[Run], args: argparse.Namespace, task: Task) -> dict[str, Any]:
    return report.document(
        runs,
        command=command_line(args),
        args={name: getattr(args, name) for name in ("optimizers", "optimizer_args", *_OPTIONS, *_SWITCHES, "resume")},
        **sections(task),
        identity=_identity(args, task),
    )


def _write_numbers(runs: Sequence[Run], args: argparse.Namespace, task: Task, out: Path) -> None:
    known = [run for run in runs if run.status != "pending"]
    report.write_json(_document(known, args, task), out / "compare.json")


def _write(runs: Sequence[Run], args: argparse.Namespace, task: Task, out: Path) -> None:
    """Write all files, the numbers first: drawing needs a package that may be missing."""
    _write_numbers(runs, args, task, out)
    print(f"wrote {out / 'compare.json'}")
    page.write(runs, title(args, task), _subtitle(args, task), command_line(args), task.unit, out / "report.html")
    print(f"wrote {out / 'report.html'}")
    try:
        from hbcore.cli.compare import plot

        plot.draw(runs, title(args, task), _subtitle(args, task), out / "compare.png", task.unit)
    except ImportError:
        print(f"no plot: matplotlib is not installed ({PIP_LINE})", file=sys.stderr)
    else:
        print(f"wrote {out / 'compare.png'}")
