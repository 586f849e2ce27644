"""``hbcore compare``: train one small model once per optimizer, then compare loss, speed and memory.

This module contains only the command line and does not import torch, so that ``hbcore --help`` stays fast. The other modules:

- ``options.py``  command-line words -> entries (label, name, keyword arguments)
- ``data.py``     real text that every machine has: the standard library of the running Python
- ``model.py``    a byte-level GPT
- ``rates.py``    learning rates: declared for small models, or tuned
- ``train.py``    the training loop shared by all optimizers, and its timing
- ``record.py``   the record of one run: plain lists of numbers
- ``progress.py`` the live display
- ``report.py``   the table and ``compare.json``; ``plot.py`` draws ``compare.png``
- ``command.py``  ties these together
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbcore.cli.compare.command import Resolver

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Train a small byte-level GPT once per optimizer, with the same initial weights and batches; print a table and write
compare.png and compare.json. The text is the source of Python's standard library: nothing is downloaded.

The learning rate of a run is the one that you give; else the one that the optimizer's plugin declares for small models, for
the nano and small models; else the class' default. The table shows it, and --tune looks for a better one.
"""
_EPILOG = """\
examples:
  hbcore compare AdamW SGD
  hbcore compare AdamW SGD --optimizer-args AdamW:betas=0.9,0.95 SGD:lr=0.03
  hbcore compare AdamW Lion --tune 3
  hbcore compare slow=AdamW fast=AdamW --optimizer-args fast:lr=0.01
"""


def _positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _several(text: str) -> int:
    """An argparse type: an integer of at least 2."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, got {value}")
    return value


_several.__name__ = "integer"
_positive.__name__ = "positive integer"  # argparse names the type in "invalid ... value"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``hbcore compare`` to ``parser``. Does not import torch."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("optimizers", nargs="+", metavar="[LABEL=]NAME", help="optimizers to compare; labels distinguish two of one name")
    add(
        "--optimizer-args",
        nargs="+",
        action="extend",
        default=[],
        metavar="[LABEL:]KEY=VALUE",
        help="constructor arguments, for all or for one label: lr=0.003 SGD:momentum=0.9 betas=0.9,0.95",
    )
    add("--steps", type=_positive, default=300, help="optimizer steps per run (default: 300)")
    add("--model-size", choices=("nano", "small", "medium"), default="nano", help="0.5, 3 or 26 M parameters")
    add("--data", metavar="FILE", help="train on this file's bytes (default: the standard library's source)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda if there is one, else cpu)")
    add("--seed", type=int, default=0, help="seed of weights, batches and torch's generator (default: 0)")
    add("--batch-size", type=_positive, help="sequences per batch (default: 32)")
    add("--eval-every", type=_positive, metavar="STEPS", help="steps between validations (default: a tenth of --steps)")
    add("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    add(
        "--default-lr",
        action="store_true",
        help="use each class' own default lr, not the one its plugin declares for small models",
    )
    add("--tune", type=_several, metavar="K", help="first try K learning rates for each optimizer, in runs a quarter as long")
    add("--out", default=".", metavar="DIR", help="folder for compare.png and compare.json (default: the current one)")


def run(args: argparse.Namespace, *, resolve: Resolver | None = None) -> int:
    """Run the comparison.

    Args:
        args: parsed by a parser from :func:`add_arguments`.
        resolve: name -> optimizer class; default: :func:`hbcore.get`.

    Returns:
        The exit status: 0, 1 (a run raised), 2 (invalid arguments; nothing was trained), 130 (Ctrl-C; the completed part is
        reported and written).
    """
    from hbcore.cli.compare.command import compare

    return compare(args, resolve)
