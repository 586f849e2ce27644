"""The parts of ``hbcore compare``: options, data, model, record, table, picture, display."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hbcore.cli.compare import data, progress, report, train
from hbcore.cli.compare.model import GPTConfig, build_model
from hbcore.cli.compare.options import Entry, parse_entries, parse_value
from hbcore.cli.compare.record import Average, Run, Step, Validation
from hbcore.errors import OptionError

TINY = GPTConfig(dim=16, depth=1, heads=2, context=16)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.003", 0.003),
        ("3", 3),
        ("0.9,0.95", (0.9, 0.95)),
        ("(1, 2)", (1, 2)),
        ("True", True),
        ("false", False),
        ("none", None),
        ("bf16", "bf16"),
        ("bf16,int8", ("bf16", "int8")),
        ("'3'", "3"),
        ("bf16+8", "bf16+8"),
        ("", ""),
    ],
)
def test_values(text: str, value: Any) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_entries_take_shared_and_own_arguments() -> None:
    words = ["fast:lr=0.1", "lr=0.2", "betas=0.9,0.99", "hb_adam:AdamW:eps=1e-6", "url=a=b"]
    shared = {"betas": (0.9, 0.99), "url": "a=b"}
    assert parse_entries(["fast=AdamW", "SGD", "hb_adam:AdamW"], words) == [
        Entry("fast", "AdamW", {"lr": 0.1, **shared}),
        Entry("SGD", "SGD", {"lr": 0.2, **shared}),
        Entry("hb_adam:AdamW", "hb_adam:AdamW", {"lr": 0.2, **shared, "eps": 1e-6}),
    ]


@pytest.mark.parametrize(
    ("optimizers", "assignments", "message"),
    [
        (["AdamW", "AdamW"], [], "'AdamW' is used twice"),
        (["a=AdamW", "a=SGD"], [], "'a' is used twice"),
        (["=AdamW"], [], "LABEL=NAME"),
        (["a="], [], "LABEL=NAME"),
        (["AdamW"], ["SGD:lr=1"], "no run is labelled 'SGD'; the labels are AdamW"),
        (["AdamW"], ["lr"], "optimizers come before"),
        (["AdamW"], ["0lr=1"], "KEY=VALUE"),
    ],
)
def test_malformed_words_are_refused(optimizers: list[str], assignments: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_entries(optimizers, assignments)


def test_stdlib_source_is_in_a_fixed_order_without_tests(tmp_path: Path) -> None:
    for name in ("a.py", "b/c.py", "test/t.py", "b/tests/t.py", "site-packages/p.py", "b/__pycache__/q.py", "n.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"[{name}]")
    whole = data.stdlib_source(tmp_path)
    assert sorted(whole.decode().split()) == ["[a.py]", "[b/c.py]"]
    assert whole == data.stdlib_source(tmp_path)
    assert data.stdlib_source(tmp_path, limit=7) == whole[:7]


def test_the_standard_library_of_this_python_is_enough() -> None:
    corpus = data.load_corpus(None, context=256)
    assert 2**20 < corpus.num_bytes <= data.MAX_BYTES
    assert b"def " in bytes(corpus.train[:100_000].tolist())


def test_batches_are_windows_of_the_text_and_depend_on_the_seed_alone() -> None:
    text = torch.arange(200, dtype=torch.uint8)

    def first(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.rand(1)  # whatever others draw from the global generator
        return next(data.training_batches(text, 16, 4, seed))

    tokens, targets = first(0)
    assert tokens.shape == (4, 16)
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, first(0)[0])
    assert not torch.equal(tokens, first(1)[0])


def test_validation_spans_the_held_out_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "VALIDATION_WINDOWS", 8)
    batches = data.validation_batches(torch.arange(200, dtype=torch.uint8), 16, 3)
    assert [len(tokens) for tokens, _ in batches] == [3, 3, 2]
    assert batches[0][0][0, 0] == 0
    assert batches[-1][1][-1, -1] == 199


def test_split_is_by_contiguous_block(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(250)))
    corpus = data.load_corpus(str(path), 16)
    assert corpus.train.tolist() == list(range(225))
    assert corpus.validation.tolist() == list(range(225, 250))


def test_model_is_causal_and_seeded() -> None:
    before = torch.random.get_rng_state()
    model = build_model(TINY, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 8:] = 0
    torch.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.equal(model(tokens)[:, 8:], model(changed)[:, 8:])
    assert torch.equal(model(tokens), build_model(TINY, seed=3)(tokens))
    assert not torch.equal(model(tokens), build_model(TINY, seed=4)(tokens))


def test_too_little_text_says_how_much_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 170)
    assert data.load_corpus(str(path), 16).validation.numel() == 17
    path.write_bytes(b"x" * 169)
    with pytest.raises(OptionError, match=r"short: 169 bytes of text, but at least 17\d are needed"):
        data.load_corpus(str(path), 16)
    monkeypatch.setattr(data, "stdlib_source", lambda: b"")
    with pytest.raises(OptionError, match="--data FILE"):
        data.load_corpus(None, 16)


def test_state_bytes_count_nested_tensors() -> None:
    p = nn.Parameter(torch.zeros(10))
    opt = torch.optim.SGD([p])
    opt.state[p] = {"a": torch.zeros(10), "b": [torch.zeros(2, dtype=torch.bfloat16), {"c": torch.zeros(3)}], "n": 7}
    assert train.state_bytes(opt) == 40 + 4 + 12


def record(label: str, *losses: float, status: Any = "completed", step_ms: float = 1.0) -> Run:
    steps = [Step(loss, 0.1 * i, step_ms, 10.0 + i) for i, loss in enumerate(losses)]
    points = [Validation(0, losses[0], 0.0), Validation(len(losses), losses[-1], 0.1 * len(losses))]
    return Run(label, label, status=status, steps=steps, validations=points, constructor_seconds=2.0)


def test_summary_leaves_the_first_step_to_its_own_figure() -> None:
    run = record("a", 5.0, 4.0, 3.0, 2.0)
    run.steps[0] = run.steps[0]._replace(step_ms=3000.0)
    run.steps[2] = run.steps[2]._replace(step_ms=9.0)
    summary = run.summary()
    assert summary["ms_per_step"] == 1.0
    assert summary["ms_per_iteration"] == 12.0
    assert summary["first_step_seconds"] == 5.0


def test_table_marks_the_best_complete_run() -> None:
    runs = [record("a", 5.0, 3.0), record("b", 5.0, 2.5), record("c", 5.0, 2.0, status="partial"), Run("d", "d")]
    runs[1].lr = 0.02
    lines = report.table(runs).splitlines()
    figures = [["a", "-", "3.0000"], ["b", "0.02", "2.5000*"], ["c", "-", "2.0000"], ["d", "-", "-"]]
    assert [line.split()[:3] for line in lines[2:6]] == figures
    assert lines[4].endswith("partial, step 2")
    assert lines[6:] == ["", "val loss: nats per byte, lower is better; * marks the lowest"]
    assert "*" not in report.table(runs[:1])


def test_a_narrow_table_leaves_out_the_last_figures_and_says_so() -> None:
    runs = [record("PSGDKron", 5.0, 3.0), record("b", 5.0, 2.0, status="diverged")]
    wide, narrow = report.table(runs).splitlines(), report.table(runs, 60).splitlines()
    assert max(map(len, wide)) > 60 >= max(map(len, narrow))
    assert narrow[0].split()[:4] == wide[0].split()[:4] == ["optimizer", "lr", "val", "loss"]
    assert narrow[3].endswith("diverged, step 2")
    assert narrow[-2:] == ["no room for state B/param, ms/iteration, first step,", "  backend: see compare.json"]


def test_json_has_no_nan() -> None:
    run = record("a", 5.0, float("nan"), status="diverged")
    run.kwargs = {"clip": float("inf"), "betas": (0.9, 0.99), "dtype": torch.bfloat16}
    entry = report.document([run], command="", args={})["runs"][0]
    assert entry["kwargs"] == {"clip": None, "betas": [0.9, 0.99], "dtype": "torch.bfloat16"}
    assert entry["train"]["loss"] == [5.0, None]
    json.dumps(entry, allow_nan=False)


def test_average_starts_at_its_first_value() -> None:
    average = Average(0.5)
    assert average.add(4.0) == pytest.approx(4.0)
    assert average.add(1.0) == pytest.approx(2.0)


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with progress.make_display(["a[b]"], 2, sys.stdout) as display:
        assert isinstance(display, progress.RichDisplay)
        display.start("a[b]")
        display.update(2, 1.5)
        display.finish(record("a[b]", 5.0, 2.0))
    assert "a[b]" in capsys.readouterr().out
