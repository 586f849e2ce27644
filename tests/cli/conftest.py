"""Tiny comparisons, for the tests of ``hbcore compare`` and ``hbcore tune``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hbcore.cli.compare import data
from hbcore.cli.compare.model import SIZES, GPTConfig

TINY = GPTConfig(dim=16, depth=1, heads=2, context=16)
TEXT = b"the quick brown fox jumps over the lazy dog\n" * 200


class Runner:
    """Runs a command on the tiny model, on one thread, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = folder / "text"
        self.text.write_bytes(TEXT)

    def __call__(self, module: ModuleType, *words: str, resolve: Any = None, steps: int = 8, **given: str) -> int:
        """The exit status; ``given`` replaces ``data``, ``out`` or ``batch_size``."""
        common = {"steps": str(steps), "batch_size": "4", "data": str(self.text), "device": "cpu", "out": str(self.folder)}
        for name, value in (common | given).items():
            words = (*words, "--" + name.replace("_", "-"), value)
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        status: int = module.run(parser.parse_args(words), resolve=resolve)
        return status

    def json(self, name: str = "compare.json") -> dict[str, Any]:
        """A file that the command wrote."""
        content: dict[str, Any] = json.loads((self.folder / name).read_text())
        return content


@pytest.fixture
def tiny_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Runner]:
    """The runner. Modules in its folder can be imported."""
    monkeypatch.setitem(SIZES, "nano", TINY)
    monkeypatch.setattr(data, "VALIDATION_WINDOWS", 8)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("COLUMNS", raising=False)
    before, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)
    yield Runner(tmp_path)
    torch.set_num_threads(threads)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
