"""``hbcore tune``: whole searches on a tiny model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hbcore import registry
from hbcore.cli import compare, tune
from hbcore.cli.compare.options import format_value, parse_value
from hbcore.errors import RuleError

optuna = pytest.importorskip("optuna")

samplers = pytest.importorskip("hbcore.cli.tune.samplers", exc_type=ImportError)
study = pytest.importorskip("hbcore.cli.tune.study", exc_type=ImportError)


def of_torch(name: str) -> Any:
    return getattr(torch.optim, name)


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else; one test looks at the pictures."""
    if "picture" not in request.node.name:
        pytest.importorskip("matplotlib")
        monkeypatch.setattr("hbcore.cli.compare.plot.draw", lambda *_: None)
        monkeypatch.setattr("hbcore.cli.tune.plot.draw", lambda *_: None)


def trials(tiny_run: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tiny_run.json("tune.json")["trials"]
    return found


def test_the_command_line_imports_neither_torch_nor_optuna():
    code = (
        "import argparse, sys; from hbcore.cli.tune import add_arguments; add_arguments(argparse.ArgumentParser());"
        "sys.exit(bool({'torch', 'optuna'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command_of_the_best_trial_ends_with_its_loss_to_the_last_bit(tiny_run, capsys):
    assert tiny_run(tune, "AdamW", "--budget", "4", "--optimizer-args", "eps=1e-6", "caution=true", steps=6) == 0
    found = tiny_run.json("tune.json")["best"]
    assert found["loss"] == min(trial["loss"] for trial in trials(tiny_run) if trial["loss"] is not None)
    out = capsys.readouterr().out
    assert found["command"] in out and "4 trials: " in out
    words = shlex.split(found["command"])
    assert words[:3] == ["hbcore", "compare", "AdamW"]
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    assert compare.run(parser.parse_args(words[2:])) == 0
    [run] = tiny_run.json("best/compare.json")["runs"]
    assert run["summary"]["final_val_loss"] == found["loss"]
    assert run["kwargs"] == {"eps": 1e-6, "caution": True, **found["arguments"]}


def test_the_first_trial_is_the_defaults_and_no_two_are_the_same(tiny_run):
    assert tiny_run(tune, "Muon", "--budget", "4", "--sampler", "random", "--pruner", "none", steps=2) == 0
    first, *others = (trial["arguments"] for trial in trials(tiny_run))
    assert first == {"lr": 0.02, "betas": [0.9, 0.99], "weight_decay": 1e-4}
    assert len({json.dumps(each) for each in (first, *others)}) == 4


def test_a_search_repeats_and_a_spent_budget_adds_nothing(tiny_run, capsys):
    words = ("AdamW", "--budget", "7", "--optimizer-args", "weight_decay=0")
    assert tiny_run(tune, *words, steps=4) == 0
    whole = tiny_run.json("tune.json")
    journal = (tiny_run.folder / study.NAME).read_bytes()
    capsys.readouterr()
    assert tiny_run(tune, *words, steps=4) == 0
    assert tiny_run.json("tune.json") == whole
    assert (tiny_run.folder / study.NAME).read_bytes() == journal
    assert "7 of 7 trials are done" in capsys.readouterr().out
    assert "weight_decay" not in whole["trials"][0]["arguments"]
    again = tiny_run.folder / "again"
    assert tiny_run(tune, *words[:2], "4", *words[3:], steps=4, out=str(again)) == 0
    assert tiny_run(tune, *words, steps=4, out=str(again)) == 0, "a larger budget goes on"
    assert tiny_run.json("again/tune.json")["trials"] == whole["trials"], "as if it had been asked for at first"


class Stops(torch.optim.Adam):
    """Adam that raises ``why`` in its ``at``-th step of the process."""

    taken, at, why = 0, 0, KeyboardInterrupt

    def step(self, closure: Any = None) -> Any:
        Stops.taken += 1
        if Stops.taken == Stops.at:
            raise Stops.why
        return super().step(closure)


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Any:
    def at(step: int, why: Any = KeyboardInterrupt) -> Any:
        monkeypatch.setattr(Stops, "taken", 0)
        monkeypatch.setattr(Stops, "at", step)
        monkeypatch.setattr(Stops, "why", why)
        return lambda name: Stops

    return at


def test_ctrl_c_keeps_what_is_done_and_the_search_goes_on_as_if_nothing_had_happened(tiny_run, stops):
    words = ("Adam", "--budget", "7", "--pruner", "none")
    assert tiny_run(tune, *words, resolve=stops(0), steps=4) == 0
    whole = trials(tiny_run)
    out = str(tiny_run.folder / "again")
    assert tiny_run(tune, *words, resolve=stops(2), steps=4, out=out) == 130
    assert tiny_run.json("again/tune.json")["trials"] == []
    assert tiny_run(tune, *words, resolve=stops(4 * 6 + 2), steps=4, out=out) == 130
    assert len(tiny_run.json("again/tune.json")["trials"]) == 6
    assert tiny_run(tune, *words, resolve=stops(0), steps=4, out=out) == 0
    assert tiny_run.json("again/tune.json")["trials"] == whole


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_process_that_is_killed(tiny_run):
    code = (
        "import sys; from hbcore.cli.compare import data, model; from hbcore.cli.main import main;"
        "data.VALIDATION_WINDOWS = 8; model.SIZES['nano'] = model.GPTConfig(16, 1, 2, 16); sys.exit(main(sys.argv[1:]))"
    )
    words = ("AdamW", "--budget", "7", "--threads", "1")
    given = [
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--data",
        str(tiny_run.text),
        "--out",
        str(tiny_run.folder),
    ]
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, "tune", *words, *given], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while "trial 3/7" not in (line := process.stdout.readline()):
            assert line
        os.kill(process.pid, signal.SIGKILL)
    assert tiny_run(tune, *words, steps=4) == 0
    assert tiny_run(tune, *words, steps=4, out=str(tiny_run.folder / "whole")) == 0
    assert trials(tiny_run) == tiny_run.json("whole/tune.json")["trials"]


def test_a_trial_that_was_running_is_ended_as_it_had_ended_or_tried_again(tiny_run):
    words = ("SGD", "--budget", "3", "--pruner", "none")

    def study_of(folder):
        backend = optuna.storages.journal.JournalFileBackend(str(folder / study.NAME))
        return optuna.load_study(study_name="tune", storage=optuna.storages.JournalStorage(backend))

    assert tiny_run(tune, *words, resolve=of_torch, steps=2) == 0
    left = study_of(tiny_run.folder)
    left.ask()  # killed while it trained
    left.ask().set_user_attr("arguments", '{"lr": 0.5}')  # and before its outcome was known
    told = left.ask()
    told.set_user_attr("arguments", '{"lr": 0.25, "weight_decay": 0.5}')
    told.set_user_attr("outcome", {"state": "complete", "loss": 1.5, "steps": 2, "why": ""})  # killed before Optuna was told
    assert tiny_run(tune, *words[:2], "5", *words[3:], resolve=of_torch, steps=2) == 0
    assert [trial["number"] for trial in trials(tiny_run)] == [0, 1, 2, 3, 4]
    assert trials(tiny_run)[3]["loss"] == 1.5 == tiny_run.json("tune.json")["best"]["loss"]
    states = [trial.state.name for trial in study_of(tiny_run.folder).trials]
    assert states == [*["COMPLETE"] * 3, "FAIL", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_journal_that_ends_in_the_middle_of_a_line_is_mended(tiny_run):
    words = ("AdamW", "--budget", "3")
    assert tiny_run(tune, *words, steps=2) == 0
    whole, path = trials(tiny_run), tiny_run.folder / study.NAME
    content = path.read_bytes()
    for cut in (len(content) - 5, len(content) // 2):
        path.write_bytes(content[:cut])
        assert tiny_run(tune, *words, steps=2) == 0
        assert trials(tiny_run) == whole


# ------------------------------------------------------------------------------------------------- trials that go wrong


def test_bad_trials_are_pruned(tiny_run):
    words = ("SGD", "--budget", "9", "--sampler", "random", "--eval-every", "2")
    assert tiny_run(tune, *words, resolve=of_torch, steps=12) == 0
    states = {trial["state"]: trial for trial in trials(tiny_run)}
    assert "pruned" in states and states["pruned"]["loss"] is None
    assert states["pruned"]["steps"] < 12 and "at step" in states["pruned"]["why"]


def test_a_diverged_trial_is_pruned_and_not_the_best(tiny_run, monkeypatch):
    monkeypatch.setattr("hbcore.cli.tune.space.FACTOR", 1e12)
    assert tiny_run(tune, "SGD", "--budget", "8", "--pruner", "none", resolve=of_torch) == 0
    found = tiny_run.json("tune.json")
    diverged = [trial for trial in found["trials"] if "diverged at step" in trial["why"]]
    assert diverged and all(trial["state"] == "pruned" and trial["loss"] is None for trial in diverged)
    assert math.isfinite(found["best"]["loss"])


@pytest.mark.parametrize(
    ("why", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "OutOfMemoryError: CUDA out of memory. Tried"),
        (RuleError("a rule mutates its arguments"), "RuleError: a rule mutates its arguments"),
    ],
)
def test_a_trial_that_raises_is_reported_and_the_next_goes_on(tiny_run, capsys, stops, why, says):
    assert tiny_run(tune, "Adam", "--budget", "3", resolve=stops(3, why), steps=4) == 0
    failed, *others = trials(tiny_run)
    assert (failed["state"], failed["why"], failed["steps"]) == ("failed", says, 2)
    assert [trial["state"] for trial in others] == ["complete", "complete"]
    out = capsys.readouterr().out
    assert f"failed: {says}" in out and "1 failed" in out


def test_a_search_of_which_nothing_completes_says_so(tiny_run, monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *_: 1 / 0)
    assert tiny_run(tune, "SGD", "--budget", "2", resolve=of_torch) == 1
    assert tiny_run.json("tune.json")["best"] is None


# ---------------------------------------------------------------------------------------------------- what is refused

REFUSED: list[tuple[list[str], str]] = [
    (["Adamw0"], "Adamw0"),
    (["AdamW", "--optimizer-args", "lr=-1"], "AdamW: HyperparameterError"),
    (["AdamW", "--optimizer-args", "lr=1", "betas=0.9,0.9", "weight_decay=0"], "nothing to search"),
    (["AdamW", "--sampler", "tpee"], "did you mean tpe?"),
    (["AdamW", "--sampler", "nonsense"], "choose from tpe, random"),
    (["AdamW", "--sampler", "FastINGO"], "pass --sampler implicit-natural-gradient"),
    (["AdamW", "--sampler", "SimpleAPIBaseSampler"], "it is a base class; pass --sampler tpe"),
    (["AdamW", "--pruner", "hyper"], "choose from median, halving, none"),
    (["AdamW", "--model", "nowhere:model"], "cannot import 'nowhere'"),
    (["AdamW", "--data", "/no/such/file"], "No such file"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "")
def test_unusable_arguments_are_one_line_and_nothing_is_tried(tiny_run, capsys, words, says):
    given = {"data": words[words.index("--data") + 1]} if "--data" in words else {}
    assert tiny_run(tune, *words, "--budget", "2", **given) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hbcore tune: error: ") and captured.err.count("\n") == 1 and says in captured.err
    assert captured.out == "" and not (tiny_run.folder / study.NAME).exists()


@pytest.mark.parametrize(
    ("words", "steps", "says"),
    [
        ([], 5, "its steps is 4, not 5"),
        (["--seed", "1"], 4, "its weights is"),
        (["--sampler", "random"], 4, "its sampler is 'tpe', not 'random'"),
        (["--optimizer-args", "eps=1e-3"], 4, "its arguments is {}, not {'eps': 0.001}"),
    ],
)
def test_another_search_is_refused(tiny_run, capsys, words, steps, says):
    assert tiny_run(tune, "AdamW", "--budget", "1", steps=4) == 0
    journal = (tiny_run.folder / study.NAME).read_bytes()
    assert tiny_run(tune, "AdamW", "--budget", "1", *words, steps=steps) == 2
    assert says in capsys.readouterr().err
    assert (tiny_run.folder / study.NAME).read_bytes() == journal


@pytest.mark.parametrize("content", [b"no journal\n", b"{}\n", b"\x00\x01\n", b"text", b"[1]\n"])
def test_a_file_that_is_no_journal_is_refused_and_kept(tiny_run, capsys, content):
    path = tiny_run.folder / study.NAME
    path.write_bytes(content)
    assert tiny_run(tune, "AdamW", "--budget", "1") == 2
    assert "cannot be read" in capsys.readouterr().err and path.read_bytes() == content


def test_without_optuna(tiny_run, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "optuna" or name.startswith("hbcore.cli.tune.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(TypeError, match=r'pip install "hbcore\[tune\]"'):
        tiny_run(tune, "AdamW", "--budget", "1")


# ------------------------------------------------------------------------------------------------ samplers and pruners


@pytest.mark.parametrize(
    ("name", "cls"),
    [("tpe", "TPESampler"), ("TPESampler", "TPESampler"), ("Random", "RandomSampler"), ("RandomSampler", "RandomSampler")],
)
def test_samplers_have_optunas_names_too(name, cls):
    assert type(samplers.sampler(name).make(0)).__name__ == cls


@pytest.mark.parametrize("name", ["BoTorchSampler", "GPSampler", "gp", "cmaes", "CmaEsSampler", "qmc"])
def test_a_sampler_that_needs_a_package_says_so(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda needed: None)
    with pytest.raises(TypeError, match=rf"--sampler {name}: it needs (scipy|cmaes): pip install \1, or pass --sampler tpe"):
        samplers.sampler(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda needed: object())
    assert samplers.sampler(name) is samplers.BUILTIN[samplers.fold(name)]


HEAVYBALLS = ("HEBOSampler", "AutoSampler", "ImplicitNaturalGradientSampler")


@pytest.mark.parametrize("name", HEAVYBALLS)
def test_heavyballs_samplers_are_optunahubs(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "optunahub", None)
    with pytest.raises(
        TypeError, match=rf"--sampler {name}: it comes from OptunaHub .*pip install optunahub, or pass --sampler"
    ):
        samplers.sampler(name).make(0)
    made = optuna.samplers.RandomSampler()
    package = argparse.Namespace(**{name: lambda seed: made})
    hub = argparse.Namespace(load_module=lambda path: package if path.startswith("samplers/") else None)
    monkeypatch.setitem(sys.modules, "optunahub", hub)
    assert samplers.sampler(name).make(0) is made
    hub.load_module = lambda path: 1 / 0
    with pytest.raises(TypeError, match=r"cannot be used: ZeroDivisionError.*pass --sampler"):
        samplers.sampler(name).make(0)


def test_every_sampler_of_heavyballs_is_mapped_or_refused():
    path = importlib.util.find_spec("heavyball")
    if path is None or path.origin is None:
        pytest.skip("needs HeavyBall")
    source = Path(path.origin).with_name("helpers.py").read_text()
    names = [line.split()[1].split("(")[0].rstrip(":") for line in source.splitlines() if line.startswith("class ")]
    names = [name for name in names if "Sampler" in name]
    assert len(names) >= 6
    for name in names:
        key = samplers.fold(name)
        assert key in {**samplers.BUILTIN, **samplers.HUB, **samplers.NOT_SAMPLERS}, name


@pytest.mark.parametrize("name", [*samplers.PRUNERS])
def test_pruners_stop_a_trial_that_lags(name):
    made = optuna.create_study(pruner=samplers.pruner(name, 30, 1))
    stopped = []
    for loss in (1.0, 1.1, 1.2, 1.3, 1.4, 9.0):
        trial = made.ask()
        stopped.append(False)
        for step in range(1, 28):
            trial.report(loss, step)
            stopped[-1] |= trial.should_prune()
        made.tell(trial, loss)
    assert not stopped[0] and stopped[-1] == (name != "none")


@pytest.mark.parametrize(
    "value", [1, 0.1, 1e-5, True, None, "bf16+8", "true", "3", "a,b", "", "it's", (0.9, 0.95), (0.5,), ("a", 1)]
)
def test_a_value_is_written_as_it_is_read(value):
    parsed = parse_value(format_value(value))
    assert parsed == value and type(parsed) is type(value)


def test_the_picture(tiny_run, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    from hbcore.cli.tune import plot

    kept: list[Any] = []
    save = plot.save
    monkeypatch.setattr(plot, "save", lambda figure, path: (kept.append(figure), save(figure, path)))
    assert tiny_run(tune, "SFAdamW", "--budget", "3", steps=3) == 0
    assert (tiny_run.folder / "tune.png").read_bytes().startswith(b"\x89PNG")
    [figure] = kept
    assert isinstance(figure, figures.Figure)
    shown = {axes.get_xlabel() for axes in figure.axes if axes.get_visible()}
    assert shown == {"trial; line: the best so far", "lr", "betas[0]", "1 - betas[1]", "weight_decay", "warmup_steps"}
    assert "3 trials" in figure.get_suptitle()
    assert registry.info("SFAdamW").spec.search
