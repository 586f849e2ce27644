"""``hbcore bench``: time optimizer steps against installed peers and against the limits of the machine.

This module contains only the command line and does not import torch, so that ``hbcore --help`` stays fast. The other modules:

- ``shapes.py``     sets of parameter shapes: GPT-2, Qwen2.5, ViT, ResNet, squares, any model that can be imported
- ``contenders.py`` the measured optimizers of hbcore; ``peers.py`` those of torch, HeavyBall and FlashOptim
- ``measure.py``    the timer, and the measurement of one shape set with interleaved contenders
- ``memory.py``     bytes of state, of a step's peak, and of the traffic that no step can avoid
- ``ceilings.py``   copy bandwidth and matmul rate, measured in the same run
- ``first_step.py`` constructor and first step in a fresh process, with cold and with warm caches
- ``accuracy.py``   ``--check``: three steps against the same rule in float64
- ``record.py``     the record of one measurement: plain lists of numbers
- ``report.py``     tables and ``bench.json``; ``chart.py`` draws ``bench.png``
- ``command.py``    ties these together
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

__all__ = ["add_arguments", "run"]

_DESCRIPTION = """\
Time optimizer steps on the parameter shapes of real models, and compare them with other libraries and with the copy
bandwidth of this machine. Prints tables; writes bench.json and bench.png. No model is trained: gradients are noise.
"""
_EPILOG = """\
examples:
  hbcore bench AdamW --shapes gpt2,qwen --dtypes fp32,bf16
  hbcore bench AdamW stack=AdamW --optimizer-args stack:caution=True --shapes square --peers torch,heavyball
  hbcore bench AdamW --shapes tiny --compile eager,inductor,triton --check
  hbcore bench hb_adam.adamw:AdamW --model my_package.models:build --device cuda
"""


def _at_least(least: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least ``least``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    parse.__name__ = "integer"  # argparse names the type in "invalid ... value"
    return parse


def _words(text: str) -> list[str]:
    """An argparse type: a comma-separated list; ``none`` and the empty string give an empty list."""
    return [] if text == "none" else [word.strip() for word in text.split(",") if word.strip()]


_words.__name__ = "comma-separated list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``hbcore bench`` to ``parser``. Does not import torch."""
    parser.description = _DESCRIPTION
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_subjects(parser)
    _add_pace(parser)
    add = parser.add_argument
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    add("--threads", type=_at_least(1), help="CPU threads (default: torch's choice)")
    add("--core", type=int, help="pin the process to this CPU core, since a thread that migrates finds cold caches")
    add("--seed", type=int, default=0, help="seed of parameters and gradients (default: 0)")
    add("--out", default=".", metavar="DIR", help="folder for bench.json and bench.png (default: the current one)")


def _add_subjects(parser: argparse.ArgumentParser) -> None:
    """Arguments that select what to measure, and on which shapes."""
    add = parser.add_argument
    add("optimizers", nargs="+", metavar="[LABEL=]NAME", help="a registered name, or module:Class for any other class")
    add(
        "--optimizer-args",
        nargs="+",
        action="extend",
        default=[],
        metavar="[LABEL:]KEY=VALUE",
        help="constructor arguments, for all or for one label: lr=0.003 stack:caution=True",
    )
    add("--shapes", type=_words, metavar="SET,...", help="shape sets (default: gpt2, or none with --model)")
    add("--model", action="append", default=[], metavar="MODULE:FACTORY", help="use the shapes of the module it returns")
    add("--dtypes", type=_words, default=["fp32"], metavar="TYPE,...", help="fp32, bf16, bf16+fp32state (default: fp32)")
    add(
        "--peers",
        type=_words,
        default=["torch"],
        metavar="PEER,...",
        help="torch, heavyball, flashoptim, schedulefree, dion, none (default: torch)",
    )
    add("--compile", type=_words, default=[], metavar="BACKEND,...", help="measure hbcore's optimizers with each of these")


def _add_pace(parser: argparse.ArgumentParser) -> None:
    """Arguments that set how long to measure, and what besides the time of a step."""
    add = parser.add_argument
    add("--windows", type=_at_least(1), default=6, help="windows of steps back to back (default: 6)")
    add("--steps", type=_at_least(1), default=10, help="steps in a window (default: 10)")
    add("--warmup", type=_at_least(1), default=3, help="windows to discard before measuring (default: 3)")
    add("--singles", type=_at_least(1), default=60, help="single synchronized steps of each kind (default: 60)")
    add("--quick", action="store_true", help="a smoke test: windows of 2 steps, 3 singles, small ceilings")
    add("--first-step", action="store_true", help="constructor plus first step in fresh processes, cold and warm caches")
    add("--first-step-timeout", type=_at_least(1), default=300, metavar="SECONDS", help="for each process (default: 300)")
    add("--check", action="store_true", help="error after 3 steps against float64, on sets of up to 16 M parameters")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark.

    Returns:
        The exit status: 0, or 1 if one of hbcore's optimizers failed. A peer that fails only gets a row with its error.

    Raises:
        HbcoreError: the arguments are invalid; nothing was measured.
    """
    from hbcore.cli.bench.command import bench

    return bench(args)
