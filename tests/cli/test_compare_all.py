"""Every optimizer, as it comes, learns more than SGD as it comes, on the model of ``hbcore compare``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import hbcore

STEPS = 300  # the default of the command


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_every_optimizer_beats_untuned_sgd(tmp_path):
    names = [n for n in hbcore.list_optimizers() if "sparse" not in hbcore.info(n).spec.capabilities]
    command = [sys.executable, "-m", "hbcore", "compare", *names, "--steps", str(STEPS), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads((tmp_path / "compare.json").read_text())["runs"]
    losses = {run["label"]: run["summary"]["final_val_loss"] for run in runs}
    assert set(losses) == set(names)
    worse = {name: loss for name, loss in losses.items() if name != "SGD" and not loss < losses["SGD"]}
    assert not worse, f"SGD reaches {losses['SGD']:.3f}; {worse}"
