"""Matrix optimizers against AdamW on a small language model, each at the best of five learning rates."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["SOAP", "PSGDKron"])
def test_it_has_the_lower_loss_after_300_steps(tmp_path, name):
    command = ["-m", "hbcore", "compare", "AdamW", name, "--steps", "300", "--tune", "5", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = {run["optimizer"]: run for run in json.loads((tmp_path / "compare.json").read_text())["runs"]}
    losses = {name: run["summary"]["final_val_loss"] for name, run in runs.items()}
    assert losses[name] < losses["AdamW"], losses
