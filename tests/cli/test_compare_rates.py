"""Which learning rate a run of ``hbcore compare`` trains with."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hbcore import registry
from hbcore.cli.compare import add_arguments, data, rates, run
from hbcore.cli.compare.model import SIZES, GPTConfig

TEXT = b"the quick brown fox jumps over the lazy dog\n" * 200


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for size in ("nano", "medium"):
        monkeypatch.setitem(SIZES, size, GPTConfig(dim=16, depth=1, heads=2, context=16))
    monkeypatch.setattr(data, "VALIDATION_WINDOWS", 8)
    monkeypatch.setenv("COLUMNS", "160")  # a narrow terminal gets fewer columns
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(folder: Path, *words: str, resolve: Any = None) -> dict[str, dict[str, Any]]:
    (folder / "text").write_bytes(TEXT)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    common = ["--steps", "8", "--batch-size", "4", "--data", str(folder / "text"), "--out", str(folder), "--device", "cpu"]
    assert run(parser.parse_args([*words, *common]), resolve=resolve) == 0
    runs = json.loads((folder / "compare.json").read_text())["runs"]
    return {each["label"]: each for each in runs}


@pytest.mark.parametrize(
    ("words", "lr", "chosen"),
    [
        ([], 0.02, "small models"),
        (["--default-lr"], 0.0025, "default"),
        (["--model-size", "medium"], 0.0025, "default"),
        (["--optimizer-args", "Muon:lr=0.5"], 0.5, "given"),
        (["--optimizer-args", "lr=0.5", "--tune", "2"], 0.5, "given"),
    ],
)
def test_the_lr_is_the_given_one_or_the_plugins_or_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], lr: float, chosen: str
) -> None:
    found = compare(tmp_path, "Muon", *words)["Muon"]
    assert (found["lr"], found["lr_from"], found["trials"]) == (lr, chosen, [])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Muon") and "eager" in line)
    assert row.split()[1] == f"{lr:g}"


def test_specs_declare_what_differs_from_the_default_and_is_usable() -> None:
    declared = {name: registry.info(name).spec.small_lr for name in registry.list_optimizers()}
    assert declared["Muon"] == declared["MuonAdamW"] == rates.small_lr("ForeachMuon") == 0.02
    for name, lr in declared.items():
        assert lr is None or lr != inspect.signature(registry.get(name)).parameters["lr"].default, name
    assert rates.small_lr("SplitOpt") is None


def test_tuning_tries_rates_around_the_first_and_trains_with_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(tmp_path, "SGD", "--tune", "5", resolve=lambda name: getattr(torch.optim, name))["SGD"]
    tried = {trial["lr"]: trial["loss"] for trial in found["trials"]}
    assert list(tried) == [0.0001, 0.00032, 0.001, 0.0032, 0.01]
    assert found["lr"] == min(tried, key=lambda lr: tried[lr]) and found["lr_from"] == "tuned"
    out = capsys.readouterr().out
    assert "SGD  lr 0.0032, 2 steps: val loss" in out
    assert f"lr of SGD, tried in short runs: 0.0001: {tried[0.0001]:.3f}, 0.00032: " in out
    fixed = compare(tmp_path, "SGD", "--optimizer-args", f"lr={found['lr']}", resolve=lambda name: getattr(torch.optim, name))
    assert fixed["SGD"]["train"]["loss"] == found["train"]["loss"], "trials leave no trace in the run"


def test_a_trial_that_diverges_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SPACING", 1e20)
    found = compare(tmp_path, "SGD", "--tune", "2", resolve=lambda name: getattr(torch.optim, name))["SGD"]
    assert [trial["loss"] is None for trial in found["trials"]] == [False, True]
    assert found["lr"] == 0.001


def test_one_trial_is_no_search(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["SGD", "--tune", "1"])
    assert "must be at least 2, got 1" in capsys.readouterr().err
