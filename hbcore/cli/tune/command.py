"""Runs ``hbcore tune``, from parsed arguments to exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hbcore import registry
from hbcore.cli import text
from hbcore.cli.compare import rates
from hbcore.cli.compare.command import INTERRUPTED, RAISED, refuse, sections
from hbcore.cli.compare.options import parse_entries
from hbcore.cli.compare.progress import PIP_LINE
from hbcore.cli.compare.report import plain, write_json
from hbcore.cli.compare.setup import Resolver, output_folder, prepare, registry_get, small_rate
from hbcore.cli.compare.train import OptimizerFactory
from hbcore.cli.tune import report
from hbcore.errors import HbcoreError, OptionError, RegistryError
from hbcore.registry.search import Searched

try:
    from hbcore.cli.tune import samplers, space
    from hbcore.cli.tune.study import Outcome, Search, best, open_study
except ModuleNotFoundError as missing:
    if missing.name != "optuna":
        raise
    raise OptionError('hbcore tune needs Optuna: pip install "hbcore[tune]"') from missing


def tune(args: argparse.Namespace, resolve: Resolver | None = None) -> int:
    """See :func:`hbcore.cli.tune.run`."""
    try:
        out = output_folder(args.out)
        search = _prepare(args, resolve, out)
    except HbcoreError as error:
        return refuse("tune", error)
    done = search.outcomes()
    print(f"{args.name}: {', '.join(f'{k} in {v}' for k, v in space.plain(search.space).items())}")
    print(f"{len(done)} of {args.budget} trials are done", flush=True)
    write = partial(_write_numbers, args, search, out)

    def say(outcome: Outcome) -> None:
        print(f"trial {outcome.number + 1}/{args.budget}  {report.line(outcome)}", flush=True)
        write()

    interrupted = search.run(args.budget, say)
    outcomes = search.outcomes()
    print(f"\n{report.table(outcomes, text.width())}\n")
    write()
    _draw(args, search, outcomes, out)
    found = best(outcomes)
    if found is not None:
        print(f"\nthe best again:\n  {_command(args, found)}")
    if interrupted:
        return INTERRUPTED
    return RAISED if found is None else 0


def _prepare(args: argparse.Namespace, resolve: Resolver | None, out: Path) -> Search:
    """Everything that can be refused is refused here.

    Raises:
        HbcoreError: the optimizer, its arguments, the task, the sampler or the pruner are unusable, or ``out`` has another
            search.
    """
    [entry] = parse_entries([args.name], args.optimizer_args)
    args.norms_every, args.default_lr = 0, False
    task = prepare(args)
    cls = (resolve or registry_get())(entry.name)
    small = small_rate(entry.name, args, known=resolve is None)

    def build(arguments: Mapping[str, Any]) -> OptimizerFactory:
        return rates.with_lr(cls, {**entry.kwargs, **arguments}, small)[0]

    try:
        built = build({})(task.new_model().named_parameters())
    except Exception as error:  # a plugin's constructor may raise anything; the user gets one line
        raise OptionError(f"{args.name}: {type(error).__name__}: {error}") from error
    lr = rates.lr_of(built)
    searched = space.space_of(cls, _declared(entry.name, resolve), lr, entry.kwargs)
    sampler = samplers.sampler(args.sampler)
    pruner = samplers.pruner(args.pruner, task.steps, task.eval_every)
    sampler.make(task.seed)  # now, so that one that cannot be made is refused
    task.warm_up()
    identity = {
        **task.identity(),
        "optimizer": args.name,
        "arguments": plain(entry.kwargs),
        "space": space.plain(searched),
        "sampler": samplers.fold(args.sampler),
        "pruner": args.pruner,
    }
    study = open_study(out, identity, pruner)
    guess = space.first_guess(searched, {**built.defaults, "lr": lr})
    return Search(study, task, build, searched, sampler, task.seed, guess)


def _declared(name: str, resolve: Resolver | None) -> Mapping[str, Searched]:
    if resolve is not None:
        return {}
    try:
        return registry.info(name).spec.search
    except RegistryError:  # a class of the core's, which has no spec
        return {}


def _command(args: argparse.Namespace, found: Outcome) -> str:
    return report.command_of(args, found)


def _write_numbers(args: argparse.Namespace, search: Search, out: Path) -> None:
    outcomes = search.outcomes()
    found = best(outcomes)
    content = {
        "schema": report.SCHEMA,
        "args": {k: v for k, v in vars(args).items() if k not in ("norms_every", "default_lr")},
        **sections(search.task),
        "space": space.plain(search.space),
        "trials": [vars(outcome) for outcome in outcomes],
        "best": None if found is None else {**vars(found), "command": _command(args, found)},
    }
    write_json(plain(content), out / "tune.json")


def _draw(args: argparse.Namespace, search: Search, outcomes: list[Outcome], out: Path) -> None:
    print(f"wrote {out / 'tune.json'}")
    try:
        from hbcore.cli.tune import plot

        plot.draw(outcomes, space.ranges(search.space), args.name, search.task.unit, out / "tune.png")
    except ImportError:
        print(f"no plot: matplotlib is not installed ({PIP_LINE})", file=sys.stderr)
    else:
        print(f"wrote {out / 'tune.png'}")
