"""What ``hbcore tune`` prints: a line per trial, the best of them, and the command that repeats one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbcore.cli.compare.command import command_line
from hbcore.cli.compare.options import format_value
from hbcore.cli.text import wrapped

if TYPE_CHECKING:
    from hbcore.cli.tune.study import Outcome

SCHEMA = "hbcore.tune/1"
SHOWN = 5  # trials of the table


def shown(arguments: Mapping[str, Any]) -> list[str]:
    """As words of a command line: ``["lr=0.003", "betas=0.9,0.99"]``."""
    return [f"{name}={format_value(value)}" for name, value in arguments.items()]


def line(outcome: Outcome) -> str:
    """One trial: its arguments and how it ended."""
    ending = f"val loss {outcome.loss:.4f}" if outcome.loss is not None else f"{outcome.state}: {outcome.why}"
    return f"{' '.join(shown(outcome.arguments))}: {ending}"


def table(outcomes: Sequence[Outcome], columns: int | None = None) -> str:
    """The best trials, best first, and how many there were of each kind; failures with their reasons, each once."""
    complete = sorted((o for o in outcomes if o.loss is not None), key=lambda o: (o.loss, o.number))
    counts = [f"{sum(o.state == state for o in outcomes)} {state}" for state in ("complete", "pruned", "failed")]
    lines = [f"{len(outcomes)} trials: {', '.join(counts)}"]
    lines += [f"{o.loss:.4f}  trial {o.number + 1:<3} {' '.join(shown(o.arguments))}" for o in complete[:SHOWN]]
    reasons = dict.fromkeys(o.why for o in outcomes if o.state == "failed")
    lines += [f"failed: {why}" for why in reasons]
    return "\n".join(part for each in lines for part in wrapped(each, columns, rest="  "))


def command_of(args: argparse.Namespace, outcome: Outcome) -> str:
    """The ``hbcore compare`` command that repeats a trial, and ends with the same loss to the last bit."""
    wanted = argparse.Namespace(**vars(args))
    wanted.optimizers = [args.name]
    wanted.optimizer_args = [*args.optimizer_args, *shown(outcome.arguments)]
    wanted.seeds, wanted.norms_every, wanted.tune, wanted.default_lr = 1, None, None, False
    wanted.out = str(Path(args.out) / "best")
    return command_line(wanted)
