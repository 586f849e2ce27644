"""From parsed arguments to what is trained: the task, and a job for each run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hbcore.cli.compare import rates
from hbcore.cli.compare.inputs import ModelSource, load_data
from hbcore.cli.compare.model import SIZES
from hbcore.cli.compare.options import Entry
from hbcore.cli.compare.record import Run
from hbcore.cli.compare.task import Task
from hbcore.cli.compare.train import OptimizerFactory
from hbcore.errors import OptionError

Resolver = Callable[[str], Callable[..., torch.optim.Optimizer]]

DEFAULT_BATCH_SIZE = 32
VALIDATIONS = 10
NORMS = 20  # measurements of a run, if nothing else is asked for
SMALL = ("nano", "small")  # the models that a plugin's small_lr is meant for


@dataclass
class Job:
    """One run to make: its record, its task, and its optimizer's constructor with all arguments but the parameters."""

    run: Run
    task: Task
    factory: OptimizerFactory
    name: str  # on the display


def registry_get() -> Resolver:
    """:func:`hbcore.get`."""
    import hbcore

    return hbcore.get


def output_folder(name: str) -> Path:
    """Create the folder now, so that an unwritable one is found before training rather than after it."""
    out = Path(name)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out {name}: {error.strerror or error}") from error
    return out


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # a well-formed name may still be a device that does not work
    except Exception as error:  # each backend raises its own type: RuntimeError, AssertionError, NotImplementedError
        reason = str(error).strip().splitlines()
        raise OptionError(f"--device {name}: {reason[0] if reason else type(error).__name__}") from error
    return device


def prepare(args: argparse.Namespace) -> Task:
    """The task that the arguments describe.

    Raises:
        OptionError: the model, the data or the device cannot be used.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return Task.build(
        ModelSource.of(args.model, args.model_size),
        load_data(args.data, SIZES[args.model_size].context),
        batch_size=args.batch_size or DEFAULT_BATCH_SIZE,
        steps=args.steps,
        eval_every=args.eval_every or max(1, args.steps // VALIDATIONS),
        seed=args.seed,
        device=_device(args.device),
        norms_every=max(1, args.steps // NORMS) if args.norms_every is None else args.norms_every,
    )


def small_rate(name: str, args: argparse.Namespace, known: bool) -> float | None:
    """The learning rate for small models, where it is known and asked for. A model of the user's is taken to be small."""
    small = args.model is not None or args.model_size in SMALL
    return rates.small_lr(name) if known and small and not args.default_lr else None


def build_jobs(entries: Sequence[Entry], args: argparse.Namespace, task: Task, resolve: Resolver | None) -> list[Job]:
    """Resolve every name and build every optimizer once, on a throwaway model, so that typos are found before training.

    This also keeps the imports that torch makes for a process' first optimizer out of the first run's timing. All runs of the
    first seed come first, so that an interrupted comparison has compared something.

    Raises:
        HbcoreError: a name is unknown, or a constructor rejects its arguments; the message names the run.
    """
    first: list[Job] = []
    for entry in entries:
        cls = (resolve or registry_get())(entry.name)
        factory, origin = rates.with_lr(cls, entry.kwargs, small_rate(entry.name, args, known=resolve is None))
        try:
            lr = rates.lr_of(factory(task.new_model().named_parameters()))
        except Exception as error:  # a plugin's constructor may raise anything; the user gets one line
            raise OptionError(f"{entry.label}: {type(error).__name__}: {error}") from error
        run = Run(entry.label, entry.name, entry.kwargs, lr, origin, seed=task.seed)
        first.append(Job(run, task, factory, entry.label))
    if args.seeds == 1:
        return first
    jobs = []
    for seed in range(task.seed, task.seed + args.seeds):
        own = task.with_seed(seed)
        for job in first:
            run = Run(job.run.label, job.run.optimizer, job.run.kwargs, job.run.lr, job.run.lr_from, seed=seed)
            jobs.append(Job(run, own, job.factory, f"{run.label}, seed {seed}"))
    return jobs
