"""The picture of ``hbcore compare``: what is drawn, named and marked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hbcore.cli.compare import plot
from hbcore.cli.compare.record import Run, Step, Validation

figure = pytest.importorskip("matplotlib.figure")


def record(label: str, *losses: float, status: Any = "completed", lr: float | None = None, pace: float = 0.1) -> Run:
    steps = [Step(loss, pace * i, 1.0, 10.0 + i) for i, loss in enumerate(losses)]
    points = [Validation(0, losses[0], 0.0), Validation(len(losses), losses[-1], pace * len(losses))]
    return Run(label, label, lr=lr, status=status, steps=steps, validations=points)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws, and returns the figure."""
    kept: list[Any] = []
    save = plot.save
    monkeypatch.setattr(plot, "save", lambda figure, path: (kept.append(figure), save(figure, path)))

    def draw(*runs: Run) -> Any:
        plot.draw(runs, "title", "subtitle", tmp_path / "compare.png")
        data = (tmp_path / "compare.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < 150_000
        return kept[-1]

    return draw


def test_curves_have_no_lag_and_skip_nan() -> None:
    line = [float(i) for i in range(90)]
    assert plot.smoothed(line)[:80] == line[:80]
    assert plot.smoothed([1.0, float("nan"), 3.0]) == [1.0, 2.0, 3.0]


def test_lines_are_named_at_their_ends_and_the_legend_has_lr_and_loss(drawn: Any) -> None:
    made = drawn(record("fast", 5.0, 3.0, 2.0, lr=0.02), record("slow", 5.0, 4.0, 3.5))
    left, right = made.axes
    for axes in (left, right):
        assert {text.get_text() for text in axes.texts} >= {"fast", "slow"}
    assert [text.get_text() for text in made.legends[0].get_texts()] == ["fast, lr 0.02: 2.000", "slow: 3.500"]
    assert "lower is better" in left.get_ylabel()


def test_seconds_are_on_a_log_axis_that_begins_after_the_first_step(drawn: Any) -> None:
    _, right = drawn(record("a", *[5.0] * 30), record("b", *[5.0] * 30, pace=2.0)).axes
    assert right.get_xscale() == "log" and "log scale" in right.get_xlabel()
    assert right.get_xlim()[0] == pytest.approx(0.1 / 1.1) and right.get_xlim()[1] > 58
    assert all(min(line.get_xdata()) > 0 for line in right.lines)


def test_a_diverged_run_is_drawn_to_its_last_finite_loss_and_marked(drawn: Any) -> None:
    ran = record("bad", 5.0, 4.0, 900.0, math.inf, status="diverged", lr=1.0)
    made = drawn(record("good", 5.0, 4.0, 3.0, 2.0), ran)
    left, _ = made.axes
    line = next(line for line in left.lines if list(line.get_xdata()) == [0.0, 1.0, 2.0])
    top = line.get_ydata()[2]
    assert list(line.get_ydata()[:2]) == [5.0, 4.0] and 5 < top < left.get_ylim()[1], "at the top, not beyond it"
    (cross,) = (line for line in left.lines if line.get_marker() == "X")
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([2.0], [top])
    assert "bad (diverged)" in {text.get_text() for text in left.texts}
    assert made.legends[0].get_texts()[1].get_text() == "bad, lr 1 (diverged at step 4)"
    assert "cross: diverged" in made.legends[0].get_title().get_text()


def test_labels_are_moved_apart_no_further_than_needed() -> None:
    assert plot.spread([1.0, 2.0, 3.0], 0.5, 0.0, 10.0) == [1.0, 2.0, 3.0]
    assert plot.spread([2.0, 2.0, 5.0], 0.5, 0.0, 10.0) == [1.75, 2.25, 5.0]
    assert plot.spread([0.0, 0.1], 0.5, 0.0, 10.0) == [0.0, 0.5]
    assert plot.spread([9.9, 10.0], 0.5, 0.0, 10.0) == [9.5, 10.0]
    assert plot.spread([], 0.5, 0.0, 1.0) == []


def test_picture_of_many_and_of_odd_runs(drawn: Any) -> None:
    runs = [record(f"run {i}", 5.0, 4.0, 3.0) for i in range(9)]
    runs += [record("nan", math.nan, math.nan, status="diverged"), Run("empty", "SGD", status="partial")]
    drawn(*runs)
    drawn()
    drawn(record("one step", 5.0))
