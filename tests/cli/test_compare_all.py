"""Every optimizer, as it comes, learns more than SGD as it comes, on the model of ``hbcore compare``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import hbcore

STEPS = 300  # the default of the command

AVERAGED = {"UnscaledAdamW"}
"""Whose step is as long as an average of gradients, at a default lr that is SGD's: they are held against SGD with a momentum
that averages. SGD's own, which sums, is ten times as long."""


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_every_optimizer_beats_untuned_sgd(tmp_path):
    names = [n for n in hbcore.list_optimizers() if "sparse" not in hbcore.info(n).spec.capabilities]
    command = [
        sys.executable,
        "-m",
        "hbcore",
        "compare",
        *names,
        "averaged=SGD",
        "--default-lr",
        "--steps",
        str(STEPS),
        "--out",
        str(tmp_path),
    ]
    command += ["--optimizer-args", "averaged:dampening=0.9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads((tmp_path / "compare.json").read_text())["runs"]
    losses = {run["label"]: run["summary"]["final_val_loss"] for run in runs}
    assert set(losses) == {*names, "averaged"}
    bars = {name: losses["averaged" if name in AVERAGED else "SGD"] for name in names if name != "SGD"}
    worse = {name: (losses[name], bar) for name, bar in bars.items() if not losses[name] < bar}
    assert not worse
