"""Entry point of the command line: imports only the chosen subcommand's module, and prints errors on one line.

Like ``list`` and ``doctor``, it uses only the standard library: the tool that diagnoses a broken environment must work in it.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NamedTuple, TextIO

from hbcore import __version__
from hbcore.errors import HbcoreError


class Command(NamedTuple):
    """A subcommand: ``functions`` is ``"module:add_arguments,run"``, imported only when the command is chosen."""

    name: str
    functions: str
    help: str

    def load(self) -> tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]:
        """Import the module and return the two functions."""
        module, _, names = self.functions.partition(":")
        add_arguments, run = (getattr(import_module(module), name) for name in names.split(","))
        return add_arguments, run


COMMANDS = (
    Command("list", "hbcore.cli.list:add_arguments,run", "list the installed optimizers and their plugins"),
    Command("show", "hbcore.cli.show:add_arguments,run", "show one optimizer: signature, defaults, state, paper, aliases"),
    Command("doctor", "hbcore.cli.doctor:add_arguments,run", "check versions, compilers, and every plugin"),
    Command("compare", "hbcore.cli.compare:add_arguments,run", "train a small model with several optimizers; plot the losses"),
    Command("tune", "hbcore.cli.tune:add_arguments,run", "look for an optimizer's hyperparameters in many short trainings"),
    Command("migrate", "hbcore.cli.migrate:add_arguments,run", "convert another library's optimizer checkpoint"),
    Command("bench", "hbcore.cli.bench:add_arguments,run", "time optimizer steps against other libraries and copy speed"),
    Command("new-plugin", "hbcore.cli.new_plugin:add_arguments,run", "make a package for an optimizer of your own"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for a usage error or an error raised by hbcore.

    Args:
        argv: the arguments without the program's name; by default, those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((command for command in COMMANDS if words[:1] == [command.name]), None)
    if chosen is None:
        parser = _top_parser()
        parser.parse_args(words)  # exits, unless there are no arguments
        parser.print_help()
        return 0
    try:
        with _one_line_warnings():
            return _run(chosen, words[1:])
    except HbcoreError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"the command {chosen.name!r} needs the module {error.name!r}, which is not installed")
    except BrokenPipeError:
        # The reader (`| head`) has exited. Python flushes stdout once more at exit, which must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _run(command: Command, words: list[str]) -> int:
    add_arguments, run = command.load()
    parser = argparse.ArgumentParser(prog=f"hbcore {command.name}", description=command.help)
    add_arguments(parser)
    status = run(parser.parse_args(words))
    sys.stdout.flush()  # so that a broken pipe is caught here
    return status


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hbcore", description="Plugin platform for PyTorch optimizers.")
    parser.add_argument("--version", action="version", version=f"hbcore {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        commands.add_parser(command.name, help=command.help)
    return parser


def _fail(message: str) -> int:
    print(f"hbcore: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print warnings without file and line, which would point into this package."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"hbcore: warning: {message}", file=file or sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
