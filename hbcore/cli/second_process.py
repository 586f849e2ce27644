"""What ``hbcore doctor`` does in second processes, so that a crash there does not end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 120  # the first import of torch from a cold network disk is slow


def python(script: str, *words: str, **variables: str) -> tuple[str, str]:
    """Run a script of this folder; returns what it printed, and why it failed or the empty string."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | variables
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(script)), *words]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"took more than {SECONDS} s"
    except OSError as error:
        return "", f"cannot start a second process: {error}"
    if done.returncode == 0:
        return done.stdout, ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout, f"exited with status {done.returncode}: {last}"


class Answer(NamedTuple):
    """The problems found, and whether the process ended at the question."""

    problems: Sequence[str] = ()
    ended: bool = False


def ask(questions: Sequence[str], without: Sequence[str] = ()) -> dict[str, Answer]:
    """What :mod:`hbcore.cli.plugin_probe` answers to each question.

    A question at which the process ends is answered with that, and another process continues with the next one.

    Args:
        questions: ``"KIND NAME"``.
        without: plugins that the process must not load.
    """
    found: dict[str, Answer] = {}
    disabled = ",".join(name for name in (os.environ.get("HBCORE_DISABLE_PLUGINS", ""), *without) if name)
    variables = {"HBCORE_DISABLE_PLUGINS": disabled, "HBCORE_STRICT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        while rest := [question for question in questions if question not in found]:
            answers = Path(folder) / str(len(found))
            answers.touch()
            _, failure = python("plugin_probe.py", str(answers), *rest, **variables)
            given = [Answer(json.loads(line)) for line in answers.read_text(encoding="utf-8").splitlines()]
            found.update(zip(rest, given, strict=False))
            if len(given) < len(rest):
                text = f"{rest[len(given)]}: the process that imported it {failure or 'ended early'}"
                found[rest[len(given)]] = Answer([text], ended=True)
    return found
