"""Runs ``hbcore compare``, from parsed arguments to exit status."""

from __future__ import annotations

import argparse
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hbcore.cli import text
from hbcore.cli.compare import rates, report
from hbcore.cli.compare.data import load_corpus
from hbcore.cli.compare.model import SIZES
from hbcore.cli.compare.options import Entry, parse_entries
from hbcore.cli.compare.progress import PIP_LINE, make_display
from hbcore.cli.compare.record import Run
from hbcore.cli.compare.train import OptimizerFactory, Task, train
from hbcore.errors import HbcoreError, OptionError

Resolver = Callable[[str], Callable[..., torch.optim.Optimizer]]

DEFAULT_BATCH_SIZE = 32
VALIDATIONS = 10
_OPTIONS = ("steps", "model_size", "data", "device", "seed", "batch_size", "eval_every", "threads", "out", "tune")
_SWITCHES = ("default_lr",)
SMALL = ("nano", "small")  # the models that a plugin's small_lr is meant for
RAISED, UNUSABLE, INTERRUPTED = 1, 2, 130  # exit statuses; shells use 130 for Ctrl-C


def compare(args: argparse.Namespace, resolve: Resolver | None = None) -> int:
    """See :func:`hbcore.cli.compare.run`."""
    try:
        entries = parse_entries(args.optimizers, args.optimizer_args)
        out = _output_folder(args.out)
        task = _prepare(args)
        rates = _small_rates(entries, args, known=resolve is None)
        runs, factories = _build_all(entries, resolve or _registry(), rates, task)
    except HbcoreError as error:
        message = " ".join(str(error).split())  # on one line, whatever a plugin's message contains
        print(f"hbcore compare: error: {message}", file=sys.stderr)
        return UNUSABLE
    print(f"{_title(args, task)}: {_subtitle(args, task)}", flush=True)
    task.warm_up()
    interrupted = _train_all(runs, factories, task, args.tune)
    runs = [run for run in runs if run.status != "pending"]  # omit runs that Ctrl-C prevented
    print(f"\n{report.table(runs, text.width())}\n")
    _write(runs, args, task, out)
    if interrupted:
        return INTERRUPTED
    return RAISED if any(run.status == "failed" for run in runs) else 0


def _registry() -> Resolver:
    import hbcore

    return hbcore.get


def _output_folder(name: str) -> Path:
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


def _prepare(args: argparse.Namespace) -> Task:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = SIZES[args.model_size]
    return Task.build(
        config,
        load_corpus(args.data, config.context),
        batch_size=args.batch_size or DEFAULT_BATCH_SIZE,
        steps=args.steps,
        eval_every=args.eval_every or max(1, args.steps // VALIDATIONS),
        seed=args.seed,
        device=_device(args.device),
    )


def _small_rates(entries: Sequence[Entry], args: argparse.Namespace, known: bool) -> list[float | None]:
    """Each run's learning rate for small models, where it is known and asked for."""
    if not known or args.default_lr or args.model_size not in SMALL:
        return [None for _ in entries]
    return [rates.small_lr(entry.name) for entry in entries]


def _build_all(
    entries: Sequence[Entry], resolve: Resolver, small_rates: Sequence[float | None], task: Task
) -> tuple[list[Run], list[OptimizerFactory]]:
    """Resolve every name and build every optimizer once, on a throwaway model, so that typos are found before training.

    This also keeps the imports that torch makes for a process' first optimizer out of the first run's timing.

    Raises:
        HbcoreError: a name is unknown, or a constructor rejects its arguments; the message names the run.
    """
    runs: list[Run] = []
    factories: list[OptimizerFactory] = []
    for entry, small in zip(entries, small_rates, strict=True):
        cls = resolve(entry.name)
        factory, origin = rates.with_lr(cls, entry.kwargs, small)
        try:
            lr = rates.lr_of(factory(task.new_model().named_parameters()))
        except Exception as error:  # a plugin's constructor may raise anything; the user gets one line
            raise OptionError(f"{entry.label}: {type(error).__name__}: {error}") from error
        runs.append(Run(entry.label, entry.name, entry.kwargs, lr, origin))
        factories.append(factory)
    return runs, factories


def _train_all(runs: Sequence[Run], factories: Sequence[OptimizerFactory], task: Task, tune: int | None) -> bool:
    """Train all runs in order; True if Ctrl-C interrupted them. An optimizer that raises fails only its own run."""
    with make_display([run.label for run in runs], task.steps, sys.stdout) as display:
        for run, factory in zip(runs, factories, strict=True):
            display.start(run.label)
            try:
                tuned = rates.tune(factory, task, run, tune, display.say) if tune else factory
                train(tuned, task, run, display.update)
            except KeyboardInterrupt:
                display.finish(run)
                return True
            except BrokenPipeError:
                raise  # the reader of our output has exited (`| head`), which is not the optimizer's fault
            except Exception as error:
                run.status, run.error = "failed", f"{type(error).__name__}: {error}"
                traceback.print_exc()
            display.finish(run)
    return False


def _title(args: argparse.Namespace, task: Task) -> str:
    return f"Byte-level GPT ({args.model_size}, {task.num_parameters / 1e6:.2f} M parameters)"


def _subtitle(args: argparse.Namespace, task: Task) -> str:
    data = f"{task.corpus.name} ({task.corpus.num_bytes / 1e6:.1f} MB)"
    return f"{data}, {task.steps} steps of {task.batch_size} x {task.context} bytes, seed {task.seed}, {task.device}"


def _command_line(args: argparse.Namespace) -> str:
    """The shell command that repeats this comparison."""
    words = ["hbcore", "compare", *args.optimizers]
    if args.optimizer_args:
        words += ["--optimizer-args", *args.optimizer_args]
    for name in _OPTIONS:
        if (value := getattr(args, name)) is not None:
            words += ["--" + name.replace("_", "-"), str(value)]
    words += ["--" + name.replace("_", "-") for name in _SWITCHES if getattr(args, name)]
    return shlex.join(words)


def _document(runs: Sequence[Run], args: argparse.Namespace, task: Task) -> dict[str, Any]:
    return report.document(
        runs,
        command=_command_line(args),
        args={name: getattr(args, name) for name in ("optimizers", "optimizer_args", *_OPTIONS, *_SWITCHES)},
        model={"size": args.model_size, "parameters": task.num_parameters, **vars(SIZES[args.model_size])},
        data={"name": task.corpus.name, "bytes": task.corpus.num_bytes, "sha256": task.corpus.sha256},
        environment=report.environment(task.device),
    )


def _write(runs: Sequence[Run], args: argparse.Namespace, task: Task, out: Path) -> None:
    """Write both files, the numbers first: drawing needs a package that may be missing."""
    report.write_json(_document(runs, args, task), out / "compare.json")
    print(f"wrote {out / 'compare.json'}")
    try:
        from hbcore.cli.compare import plot

        plot.draw(runs, _title(args, task), _subtitle(args, task), out / "compare.png")
    except ImportError:
        print(f"no plot: matplotlib is not installed ({PIP_LINE})", file=sys.stderr)
    else:
        print(f"wrote {out / 'compare.png'}")
