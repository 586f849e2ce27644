"""``report.html``: one file that shows everything, needs nothing, and follows the reader's theme."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from hbcore.cli import compare
from hbcore.cli.compare import page
from hbcore.cli.compare.record import Norms, Run, Step, Validation
from hbcore.cli.compare.svg import Axis, Chart, Line

EMPTY = ("meta", "br", "link", "img")


class Outline(HTMLParser):
    """Checks that tags nest, and keeps text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def record(label: str, *losses: float, seed: int = 0, status: Any = "completed", **more: Any) -> Run:
    steps = [Step(loss, 0.1 * i, 1.0, 10.0) for i, loss in enumerate(losses)]
    points = [Validation(0, losses[0], 0.0), Validation(len(losses), losses[-1], 0.1 * len(losses))]
    norms = [Norms(step, [1e-3, 0.0], [0.1, 0.0]) for step in (1, 2)]
    kept: dict[str, Any] = {"norm_names": ["weight", "bias"], "norms": norms, "state_bytes_per_param": 8.0}
    return Run(label, label, seed=seed, status=status, steps=steps, validations=points, **(kept | more))


def written(folder: Path, *runs: Run) -> str:
    page.write(runs, "title", "subtitle", "hbcore compare", "nats per byte", folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_comparison_writes_a_page_that_shows_all_of_it(tiny_run):
    words = ("AdamW", "SGD", "--seeds", "2", "--norms-every", "2")
    assert tiny_run(compare, *words, resolve=lambda name: getattr(torch.optim, name)) == 0
    text = (tiny_run.folder / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    shown = " ".join(outline.words)
    for word in ("AdamW", "SGD", "±", "state, bytes per parameter", "constructor and first step", "blocks.0.up.weight"):
        assert word in shown, word
    result = tiny_run.json()
    assert result["command"] in shown and f"{result['summaries'][0]['final_val_loss']:.4f} ±" in shown
    parameters = len(result["runs"][0]["norms"]["update_rms"])
    assert sum(tag == "svg" and "role" in attrs for tag, attrs in outline.tags) == 2 + 3 * parameters
    assert sum("line s1" in str(attrs.get("class")) for _, attrs in outline.tags) >= 2 + 2 * parameters
    assert "prefers-color-scheme: dark" in text


def test_the_page_needs_no_network_and_no_script(tmp_path: Path):
    text = written(tmp_path, record("a", 5.0, 3.0), record("b", 5.0, 4.0))
    for word in ("<script", "http:", "https:", "<link", "@import", "src=", "javascript", "//"):
        assert word not in text, word
    assert not re.search(r"url\((?!#)", text), "only references within the page"


def test_labels_are_text_whatever_they_contain(tmp_path: Path):
    text = written(
        tmp_path, record("</style><script>&", 5.0, 3.0, norm_names=["<b>", '"'], norms=[Norms(1, [1.0, 1.0], [1.0, 1.0])])
    )
    assert "<script" not in text and "<b>" not in text
    assert "</style><script>&" in " ".join(Outline(text).words)


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [Run("empty", "SGD", status="failed")],
        [record("bad", 5.0, math.inf, status="diverged"), record("good", 5.0, 4.0)],
        [record("nan", math.nan, math.nan, status="diverged", norms=[Norms(1, [math.nan, 0.0], [math.inf, 0.0])])],
        [record("off", 5.0, 4.0, norms=[], norm_names=[])],
        [record(f"run {i}", 5.0, 4.0) for i in range(23)],
        [record("flat", 3.0, 3.0), record("one", 3.0)],
        [record("cuda", 5.0, 4.0, peak_bytes=123_456_789)],
    ],
)
def test_odd_runs_are_shown_too(tmp_path: Path, runs: list[Run]):
    text = written(tmp_path, *runs)
    outline = Outline(text)
    assert "nan" not in " ".join(
        str(attrs) for tag, attrs in outline.tags if tag != "svg" and "nan" not in str(attrs.get("class"))
    )
    assert ("123 MB" in text) == any(run.peak_bytes for run in runs)


def test_only_some_parameters_of_a_large_model_are_drawn(tmp_path: Path):
    names = [f"p{i}" for i in range(70)]
    text = written(tmp_path, record("a", 5.0, 3.0, norm_names=names, norms=[Norms(1, [1.0] * 70, [1.0] * 70)]))
    assert text.count("<svg viewBox") - 1 == 2 + 3 * page.MOST_PARAMETERS
    assert "compare.json has the other 10" in text


def test_a_chart_puts_values_where_its_axes_say():
    line = Line("a", 0, [1.0, 10.0, 100.0], [1.0, 2.0, 3.0], sigmas=[0.5, 0.5, 0.5])
    chart = Chart("t", [line], Axis(log=True, span=(1.0, 100.0)), Axis(span=(0.0, 4.0)), width=264, height=166)
    drawn = ElementTree.fromstring(chart.svg())
    [curve] = [e for e in drawn.iter("polyline")]
    assert curve.get("points") == "52.0,103.0 152.0,78.0 252.0,53.0"
    [band] = [e for e in drawn.iter("polygon")]
    assert band.get("points") == "52.0,90.5 152.0,65.5 252.0,40.5 252.0,65.5 152.0,90.5 52.0,115.5"


@pytest.mark.parametrize(
    ("axis", "span", "ticks"),
    [
        (Axis(), (0.0, 10.0), [0, 2, 4, 6, 8, 10]),
        (Axis(), (2.13, 2.87), [2.2, 2.4, 2.6, 2.8]),
        (Axis(log=True), (0.9, 110.0), [1, 3, 10, 30, 100]),
        (Axis(log=True), (0.02, 0.11), [0.02, 0.05, 0.1]),
        (Axis(log=True), (1e-9, 1e3), [1e-9, 1e-6, 1e-3, 1.0, 1e3]),
    ],
)
def test_ticks_are_few_and_round(axis: Axis, span: tuple[float, float], ticks: list[float]):
    assert axis.ticks(*span) == pytest.approx(ticks)
