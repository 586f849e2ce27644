"""``hbcore tune``: look for the hyperparameters of one optimizer, in runs of ``hbcore compare``.

This module contains only the command line and imports neither torch nor Optuna. The other modules:

- ``space.py``    where to look: what the optimizer's plugin declares, or what follows from the roles of hyperparameters
- ``samplers.py`` names of samplers and pruners -> Optuna's
- ``study.py``    the trials, kept in a file that an interrupted search goes on from
- ``report.py``   the table and ``tune.json``; ``plot.py`` draws ``tune.png``
- ``command.py``  ties these together
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hbcore.cli.compare import CONTRACT, add_task_arguments, positive

if TYPE_CHECKING:
    from hbcore.cli.compare.setup import Resolver

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Look for the hyperparameters of one optimizer: each trial is a run of "hbcore compare" with other hyperparameters, and trials
that do badly are stopped early. Writes tune.json and tune.png, and prints the "hbcore compare" command of the best trial.

The trials are kept in DIR/tune.journal. The same command goes on where it was interrupted, and does nothing more once its
budget is spent; a larger --budget adds trials. Needs Optuna: pip install "hbcore[tune]".
"""
_EPILOG = """\
examples:
  hbcore tune AdamW --budget 20
  hbcore tune Muon --budget 30 --optimizer-args weight_decay=0 --steps 200 --out muon

samplers: tpe, random, qmc; gp (needs scipy), cmaes (needs cmaes); hebo, auto, implicit-natural-gradient from OptunaHub, which
downloads them. Optuna's and HeavyBall's names for them are accepted too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``hbcore tune`` to ``parser``. Imports neither torch nor Optuna."""
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EPILOG}\n{CONTRACT}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("name", metavar="NAME", help="the optimizer")
    add("--budget", type=positive, required=True, metavar="N", help="trials in all, those of earlier calls included")
    add(
        "--optimizer-args",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="constructor arguments of every trial; what is given here is not searched",
    )
    add_task_arguments(parser)
    add("--sampler", default="tpe", help="what proposes hyperparameters, see below (default: tpe)")
    add("--pruner", default="median", help="what stops trials early: median, halving or none (default: median)")
    add("--out", default="tune", metavar="DIR", help="folder for tune.journal, tune.json and tune.png (default: tune)")


def run(args: argparse.Namespace, *, resolve: Resolver | None = None) -> int:
    """Run the search.

    Args:
        args: parsed by a parser from :func:`add_arguments`.
        resolve: name -> optimizer class; default: :func:`hbcore.get`.

    Returns:
        The exit status: 0, 1 (no trial completed), 2 (invalid arguments; nothing was tried), 130 (Ctrl-C; what was done is kept
        and reported).
    """
    from hbcore.cli.tune.command import tune

    return tune(args, resolve)
