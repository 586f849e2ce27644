"""``hbcore compare --seeds``: several runs of each optimizer, their means and deviations."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from hbcore.cli import compare
from hbcore.cli.compare import plot, report
from hbcore.cli.compare.curves import Curve
from hbcore.cli.compare.groups import grouped
from hbcore.cli.compare.record import Run, Step, Validation


def of_torch(name: str) -> Any:
    return getattr(torch.optim, name)


def record(seed: int, *losses: float, label: str = "a", status: Any = "completed") -> Run:
    steps = [Step(loss, 0.1 * (i + seed), 1.0 + seed, 10.0) for i, loss in enumerate(losses)]
    points = [Validation(0, losses[0], 0.0), Validation(len(losses), losses[-1], 0.1 * len(losses))]
    return Run(label, label, seed=seed, status=status, steps=steps, validations=points)


def test_each_seed_is_a_run_of_its_own_and_the_summary_has_mean_sigma_and_n(tiny_run, capsys):
    assert tiny_run(compare, "AdamW", "SGD", "--seeds", "3", "--seed", "5", resolve=of_torch) == 0
    result = tiny_run.json()
    assert [(r["label"], r["seed"]) for r in result["runs"]] == [(n, s) for s in (5, 6, 7) for n in ("AdamW", "SGD")]
    finals = [r["summary"]["final_val_loss"] for r in result["runs"] if r["label"] == "AdamW"]
    assert len(set(finals)) == 3
    [adamw, sgd] = result["summaries"]
    assert (adamw["label"], adamw["n"], sgd["n"]) == ("AdamW", 3, 3)
    assert adamw["final_val_loss"] == pytest.approx(statistics.fmean(finals))
    assert adamw["val_loss_sigma"] == pytest.approx(statistics.stdev(finals))
    shown = f"{statistics.fmean(finals):.4f} ± {statistics.stdev(finals):.4f}*"
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("AdamW  ") and "±" in line)
    assert shown in row and row.split()[-1] == "3"
    once = result["runs"][2]
    assert tiny_run(compare, "AdamW", "--seed", "6", resolve=of_torch) == 0
    assert tiny_run.json()["runs"][0]["train"]["loss"] == once["train"]["loss"], "a seed's run does not depend on the others"


def test_the_rate_is_tuned_once(tiny_run):
    assert tiny_run(compare, "SGD", "--seeds", "2", "--tune", "2", resolve=of_torch) == 0
    first, second = tiny_run.json()["runs"]
    assert first["lr"] == second["lr"] and second["lr_from"] == "tuned"
    assert len(first["trials"]) == 2 and not second["trials"]


def test_incomplete_runs_are_counted_but_not_averaged():
    runs = [record(0, 5.0, 3.0), record(1, 5.0, math.inf, status="diverged"), record(2, 5.0, 2.0)]
    [group] = grouped(runs)
    assert group.loss is not None and (group.loss.mean, group.loss.n) == (2.5, 2)
    assert group.remark == "1 of 3 diverged"
    lines = report.table([*runs, record(0, 5.0, 2.4, label="b")]).splitlines()
    assert "2.5000 ± 0.7071 " in lines[2] and lines[2].endswith("1 of 3 diverged") and "2.4000*" in lines[3]
    assert "n seeds" in lines[5]
    assert grouped([record(1, 5.0, math.inf, status="diverged")])[0].loss is None


def test_a_band_is_one_deviation_around_the_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = [record(0, 5.0, 3.0, 2.0), record(1, 5.0, 4.0, 4.0)]
    [group] = grouped(runs)
    curve = Curve.of(group, 0, seconds=False)
    each = [Curve.of(grouped([run])[0], 0, seconds=False).y for run in runs]
    assert curve.y == [statistics.fmean(pair) for pair in zip(*each, strict=True)]
    assert curve.sigmas == [statistics.stdev(pair) for pair in zip(*each, strict=True)]
    assert curve.points == [(0.0, 5.0), (3.0, 3.0)]
    assert not Curve.of(grouped(runs[:1])[0], 0, seconds=False).sigmas
    pytest.importorskip("matplotlib")
    kept: list[Any] = []
    monkeypatch.setattr(plot, "save", lambda figure, path: kept.append(figure))
    plot.draw(runs, "title", "subtitle", tmp_path / "p.png")
    assert [len(axes.collections) for axes in kept[0].axes] == [1, 1], "a band in each panel"
    assert kept[0].legends[0].get_texts()[0].get_text() == "a: 3.000 ± 1.414 (n = 2)"
    assert "band" in kept[0].legends[0].get_title().get_text()
