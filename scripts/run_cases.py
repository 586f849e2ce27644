"""Run every script of a folder, each in a process of its own, and say which failed.

    python scripts/run_cases.py FOLDER [--seconds N]

A case is a small program that shows a fault, or once did: it exits with 0 if all is well. Cases need not be part of this
repository. They run in its root, with its sources and its plugins' before installed ones; folders within the folder count.
Prints a table of name, exit status and seconds, and the last lines of what a case that failed has printed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

SECONDS = 600
"""How long a case may take."""

LINES = 15
"""How many of the last lines of a failed case are shown."""


class Case(NamedTuple):
    """What came of a script.

    Attributes:
        name: its path within the folder.
        status: its exit status, negative for a signal; None if it took too long.
        seconds: how long it ran.
        output: what it printed.
    """

    name: str
    status: int | None
    seconds: float
    output: str

    def row(self) -> str:
        """A line of the table."""
        return f"{self.name:<40} {'too long' if self.status is None else self.status:>8} {self.seconds:8.1f}"


def run(script: Path, name: str, limit: float) -> Case:
    """Run one script in the repository's root, for at most ``limit`` seconds, with the processes that it starts."""
    sources = [str(ROOT), *(str(folder) for folder in sorted(ROOT.glob("plugins/*/src")))]
    paths = [*sources, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    status: int | None
    try:
        output, _ = process.communicate(timeout=limit)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    return Case(name, status, time.monotonic() - started, output)


def run_all(folder: Path, limit: float = SECONDS) -> list[Case]:
    """Run every script below ``folder``, in the order of their names, and print the table.

    Raises:
        FileNotFoundError: there is none.
    """
    scripts = sorted(path for path in folder.resolve().rglob("*.py"))
    if not scripts:
        raise FileNotFoundError(f"{folder} holds no scripts; pass a folder of Python files.")
    print(f"{'case':<40} {'status':>8} {'seconds':>8}")
    cases = []
    for script in scripts:
        case = run(script, str(script.relative_to(folder.resolve())), limit)
        cases.append(case)
        print(case.row(), flush=True)
        if case.status != 0:
            print("\n".join(f"    | {line}" for line in case.output.splitlines()[-LINES:]), flush=True)
    failed = sum(case.status != 0 for case in cases)
    print(f"{len(cases)} cases, {failed} failed")
    return cases


def main(arguments: Sequence[str]) -> int:
    """Run the cases of a folder; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long each case may take")
    options = parser.parse_args(arguments)
    try:
        cases = run_all(options.folder, options.seconds)
    except FileNotFoundError as error:
        parser.error(str(error))
    return int(any(case.status != 0 for case in cases))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
