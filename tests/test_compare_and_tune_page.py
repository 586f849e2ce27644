"""``docs/compare-and-tune.md``: its commands and its Python run as they stand, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from hbcore.cli.compare import data
from hbcore.cli.compare.model import SIZES, GPTConfig
from hbcore.cli.main import main

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "compare-and-tune.md").read_text()
COMMANDS = re.findall(r"^    (hbcore .*)$", PAGE, flags=re.MULTILINE)
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a text and the page's module."""
    pytest.importorskip("optuna")
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 200)
    (tmp_path / "mine.py").write_text(SNIPPETS[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(data, "VALIDATION_WINDOWS", 8)
    monkeypatch.setitem(SIZES, "nano", GPTConfig(dim=8, depth=1, heads=2, context=8))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def shortened(command: str) -> list[str]:
    """The command's words, with few steps, small batches and, unless it names its data, a short text."""
    words = shlex.split(command)[1:]
    words[words.index("--steps") + 1] = "6"
    if "--budget" in words:
        words[words.index("--budget") + 1] = "4"
    return [*words, "--batch-size", "2", "--device", "cpu", *([] if "--data" in words else ["--data", "text"])]


def test_every_command_runs(folder, monkeypatch):
    monkeypatch.setattr("hbcore.cli.compare.plot.draw", lambda *_: None)  # its own tests look at it
    assert [c.split()[1] for c in COMMANDS] == ["compare", "compare", "compare", "tune", "tune"]
    for command in COMMANDS:
        assert main(shortened(command)) == 0, command
    assert {path.name for path in folder.glob("*/*.json")} == {"compare.json", "tune.json"}
    found = json.loads((folder / "tuned" / "tune.json").read_text())["best"]
    assert main(shlex.split(found["command"])[1:]) == 0
    [again] = json.loads((folder / "tuned" / "best" / "compare.json").read_text())["runs"]
    assert again["summary"]["final_val_loss"] == found["loss"]


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_every_command_runs_at_full_length(folder, monkeypatch):
    monkeypatch.undo()  # the nano model, on the standard library
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for command in COMMANDS:
        assert main(shlex.split(command)[1:]) == 0, command


def test_the_spec_is_valid():
    exec(SNIPPETS[1], {})
    assert "search=" in SNIPPETS[1] and len(SNIPPETS) == 2
