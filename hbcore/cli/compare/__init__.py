"""``hbcore compare``: train one small model once per optimizer, then compare loss, speed and memory.

This module contains only the command line and does not import torch, so that ``hbcore --help`` stays fast. The other modules:

- ``options.py``  command-line words -> entries (label, name, keyword arguments)
- ``inputs.py``   models and data by path: the contract, and what is said of those that break it
- ``data.py``     real text that every machine has: the standard library of the running Python
- ``model.py``    a byte-level GPT
- ``task.py``     what all runs share; ``setup.py`` makes it, and a job for each run, from the arguments
- ``rates.py``    learning rates: declared for small models, or tuned
- ``train.py``    the training loop shared by all optimizers, and its timing; ``hbcore tune`` uses it too
- ``record.py``   the record of one run: plain lists of numbers; ``groups.py`` sums up those of several seeds
- ``resume.py``   finished runs from ``compare.json``, and the checkpoint of the unfinished one
- ``progress.py`` the live display
- ``report.py``   the table and ``compare.json``; ``plot.py`` draws ``compare.png`` from ``curves.py``
- ``page.py``     ``report.html``, whose charts ``svg.py`` draws
- ``command.py``  ties these together
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbcore.cli.compare.setup import Resolver

__all__ = ["add_arguments", "add_task_arguments", "non_negative", "positive", "run"]

_DESCRIPTION = """\
Train a small byte-level GPT once per optimizer, with the same initial weights and batches; print a table and write
compare.json, report.html and compare.png. The text is the source of Python's standard library: nothing is downloaded.

The learning rate of a run is the one that you give; else the one that the optimizer's plugin declares for small models, for
the nano and small models; else the class' default. The table shows it, and --tune looks for a better one.
"""
CONTRACT = """\
a model or data of your own:
  --model package.module:function
      function() returns a torch.nn.Module with a method loss(*batch), or a pair (module, loss) with a function
      loss(module, *batch); the loss is a 0-d floating-point tensor. It is called once per seed, with torch's generator
      seeded, and builds on the CPU.
  --data package.module:function
      function(split, batch_size, seed) returns an iterable of batches: tuples of tensors whose first dimension is the number
      of examples. split is "train", which must have a batch for every step, or "validation", which must end; seed alone
      decides the training batches.
  --data FILE
      bytes: batches are (tokens, targets), each [batch, context], int64, and the last tenth is held out.
  The current folder is searched for modules. Models by path count as small ones: --default-lr turns that off.
"""
_EPILOG = """\
examples:
  hbcore compare AdamW SGD
  hbcore compare AdamW SGD --optimizer-args AdamW:betas=0.9,0.95 SGD:lr=0.03
  hbcore compare AdamW Lion --tune 3
  hbcore compare slow=AdamW fast=AdamW --optimizer-args fast:lr=0.01
  hbcore compare AdamW Muon --seeds 3 --out runs
  hbcore compare AdamW Muon --seeds 3 --out runs --resume
"""


def non_negative(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive(text: str) -> int:
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


_several.__name__ = non_negative.__name__ = "integer"
positive.__name__ = "positive integer"  # argparse names the type in "invalid ... value"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``hbcore compare`` to ``parser``. Does not import torch."""
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EPILOG}\n{CONTRACT}"
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
    add_task_arguments(parser)
    add(
        "--default-lr",
        action="store_true",
        help="use each class' own default lr, not the one its plugin declares for small models",
    )
    add("--tune", type=_several, metavar="K", help="first try K learning rates for each optimizer, in runs a quarter as long")
    add(
        "--seeds",
        type=positive,
        default=1,
        metavar="N",
        help="runs of each, with seeds --seed, --seed + 1, ...: mean and sigma",
    )
    add(
        "--norms-every",
        type=non_negative,
        metavar="STEPS",
        help="steps between measurements of each parameter's update and weight RMS, which copy the weights before the step and "
        "compare them after it, outside the clock; 0 for none (default: a twentieth of --steps)",
    )
    add(
        "--out", default=".", metavar="DIR", help="folder for compare.json, report.html, compare.png (default: the current one)"
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the comparison that was interrupted in --out: finished runs are read, the unfinished one goes on from "
        "its last validation",
    )


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is trained, and on what; ``hbcore tune`` has them too. Does not import torch."""
    add = parser.add_argument
    add("--steps", type=positive, default=300, help="optimizer steps per run (default: 300)")
    add("--model-size", choices=("nano", "small", "medium"), default="nano", help="0.5, 3 or 26 M parameters")
    add("--model", metavar="MODULE:FUNCTION", help="a model of your own in place of --model-size, see below")
    add("--data", metavar="FILE", help="a file's bytes, or MODULE:FUNCTION, see below (default: the standard library's source)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: cuda if there is one, else cpu)")
    add("--seed", type=int, default=0, help="seed of weights, batches and torch's generator (default: 0)")
    add("--batch-size", type=positive, help="sequences per batch (default: 32)")
    add("--eval-every", type=positive, metavar="STEPS", help="steps between validations (default: a tenth of --steps)")
    add("--threads", type=positive, help="CPU threads (default: torch's choice)")


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
