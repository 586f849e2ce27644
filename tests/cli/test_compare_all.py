"""Every optimizer, as it comes, learns more than SGD as it comes, on the model of ``hbcore compare``."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import hbcore

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

NAMES = [n for n in hbcore.list_optimizers() if n != "SGD" and "sparse" not in hbcore.info(n).spec.capabilities]

AVERAGED = {"UnscaledAdamW"}
"""Whose step is as long as an average of gradients, at a default lr that is SGD's: they are held against SGD with a momentum
that averages. SGD's own, which sums, is ten times as long."""

RATES = {"QSGD": 0.025}
"""Learning rates in place of HeavyBall's defaults that are far too small, which the docstrings say."""


def losses(*arguments: str) -> dict[str, float]:
    """The held-out loss of each run after the command's default number of steps, by its label."""
    command = [sys.executable, "-m", "hbcore", "compare", *arguments, "--default-lr"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--out", folder], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        runs = json.loads((Path(folder) / "compare.json").read_text())["runs"]
    return {run["label"]: run["summary"]["final_val_loss"] for run in runs}


@pytest.fixture(scope="session")
def bars(tmp_path_factory) -> Callable[[], dict[str, float]]:
    """What untuned SGD reaches, by itself and with a momentum that averages; trained by one of the processes that test."""
    folder = tmp_path_factory.getbasetemp()
    kept = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "bars.json"

    def found() -> dict[str, float]:
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                kept.write_text(json.dumps(losses("SGD", "averaged=SGD", "--optimizer-args", "averaged:dampening=0.9")))
        return json.loads(kept.read_text())

    return found


def test_untuned_sgd_trains(bars):
    """To less than a guess of any byte. First, so that the others need not wait for it once they have trained."""
    assert all(loss < math.log(256) - 1 for loss in bars().values())


@pytest.mark.parametrize("name", NAMES)
def test_it_beats_untuned_sgd(name, bars):
    rate = ("--optimizer-args", f"{name}:lr={RATES[name]}") if name in RATES else ()
    assert losses(name, *rate)[name] < bars()["averaged" if name in AVERAGED else "SGD"]
