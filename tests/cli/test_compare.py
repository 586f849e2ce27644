"""``hbcore compare``: whole runs, on a tiny model, with torch's own optimizers unless a test needs another."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hbcore.cli.compare import add_arguments, command, data, report, run, train
from hbcore.cli.compare.inputs import ModelSource
from hbcore.cli.compare.model import GPT, SIZES, GPTConfig
from hbcore.cli.compare.record import Run
from hbcore.errors import UnknownOptimizerError

TINY = GPTConfig(dim=16, depth=1, heads=2, context=16)
TEXT = b"the quick brown fox jumps over the lazy dog\n" * 200


class Special(torch.optim.SGD):
    """SGD that tests bend to their needs through class attributes."""

    calls: list[str] = []  # noqa: RUF012


class Modal(Special):
    def eval(self) -> None:
        self.calls.append("eval")

    def train(self) -> None:
        self.calls.append("train")

    def step(self, closure: Any = None) -> Any:
        self.calls.append("step")
        return super().step(closure)


class NeedsClosure(Special):
    requires_closure = True

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        return super().step(closure)


class Interrupted(Special):
    def step(self, closure: Any = None) -> Any:
        self.calls.append("step")
        if len(self.calls) == 6:
            raise KeyboardInterrupt
        return super().step(closure)


class Broken(Special):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("no such kernel")


class Noisy(Special):
    """Draws from the global generator, as an optimizer with random probes may."""

    def step(self, closure: Any = None) -> Any:
        self.calls.append(f"{torch.rand(()).item():.6f}")
        return super().step(closure)


class ConsumesGradients(Special):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        return result


LOCAL = {cls.__name__: cls for cls in (Modal, NeedsClosure, Interrupted, Broken, Noisy, ConsumesGradients)}


def resolve(name: str) -> type[torch.optim.Optimizer]:
    cls = LOCAL.get(name) or getattr(torch.optim, name, None)
    if cls is None:
        raise UnknownOptimizerError(f"no optimizer is named {name!r};\ndid you mean 'AdamW'?")
    return cls


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setitem(SIZES, "nano", TINY)
    monkeypatch.setattr(Special, "calls", [])
    monkeypatch.setattr(data, "VALIDATION_WINDOWS", 8)
    (tmp_path / "text").write_bytes(TEXT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size a second thread only waits
    yield
    torch.set_num_threads(threads)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def compare(tmp_path: Path, *words: str, steps: int = 10) -> tuple[int, dict[str, Any]]:
    """Exit status and ``compare.json`` ({} where none was written)."""
    common = ["--steps", str(steps), "--data", str(tmp_path / "text"), "--out", str(tmp_path), "--device", "cpu"]
    status = run(parse(*words, "--batch-size", "4", *common), resolve=resolve)
    path = tmp_path / "compare.json"
    return status, json.loads(path.read_text()) if path.exists() else {}


def test_the_command_line_imports_no_torch() -> None:
    code = (
        "import argparse, sys; from hbcore.cli.compare import add_arguments; add_arguments(argparse.ArgumentParser());"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in shown for name in (*command._OPTIONS, *command._SWITCHES, "optimizer_args"))
    with pytest.raises(SystemExit):
        parse("SGD", "--steps", "0")
    assert "must be at least 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_a_comparison_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = compare(tmp_path, "AdamW", "SGD", "--optimizer-args", "lr=0.01", "AdamW:betas=0.9,0.95", steps=40)
    assert status == 0
    adamw, sgd = result["runs"]
    assert result["schema"] == report.SCHEMA
    assert adamw["kwargs"] == {"lr": 0.01, "betas": [0.9, 0.95]}
    assert adamw["completed"] and sgd["completed"]
    # one initialisation and one sequence of batches: the first losses agree to the last bit, later ones do not
    assert adamw["train"]["loss"][0] == sgd["train"]["loss"][0]
    assert adamw["validation"]["loss"][0] == sgd["validation"]["loss"][0]
    assert adamw["validation"]["step"] == list(range(0, 41, 4))
    assert adamw["summary"]["final_val_loss"] == adamw["validation"]["loss"][-1]
    assert adamw["summary"]["final_val_loss"] < 4 < sgd["summary"]["final_val_loss"]
    for entry in result["runs"]:
        assert all(len(column) == 40 for column in entry["train"].values())
        assert entry["train"]["seconds"] == sorted(entry["train"]["seconds"])
        assert entry["summary"]["backend"] == "torch"
        assert 0 < entry["summary"]["ms_per_step"] < entry["summary"]["ms_per_iteration"]
    assert 8 < adamw["summary"]["state_bytes_per_param"] < 8.1
    assert sgd["summary"]["state_bytes_per_param"] == 0
    assert result["environment"]["torch"] == str(torch.__version__)
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "AdamW  step  4/40  train loss" in output
    assert output.count("*") == 2 and "* marks the lowest" in output


def test_a_run_repeats(tmp_path: Path) -> None:
    once = compare(tmp_path, "AdamW")[1]["runs"][0]
    again = compare(tmp_path, "SGD", "AdamW")[1]["runs"][1]
    other = compare(tmp_path, "AdamW", "--seed", "1")[1]["runs"][0]
    assert once["train"]["loss"] == again["train"]["loss"]
    assert once["train"]["loss"] != other["train"]["loss"]


def test_the_command_in_the_json_repeats_the_run(tmp_path: Path) -> None:
    _, result = compare(tmp_path, "a=AdamW", "--optimizer-args", "a:lr=0.1", "--eval-every", "3", steps=4)
    words = result["command"].split()
    assert words[:2] == ["hbcore", "compare"]
    assert vars(parse(*words[2:])) == result["args"]
    assert result["runs"][0]["validation"]["step"] == [0, 3, 4]


def test_modes_are_switched_around_validation(tmp_path: Path) -> None:
    status, _ = compare(tmp_path, "Modal", "--eval-every", "2", steps=3)
    assert status == 0
    assert Special.calls == ["train", "step", "step", "eval", "train", "step", "eval", "train"]


def test_closure_and_consumed_gradients_change_nothing(tmp_path: Path) -> None:
    _, result = compare(tmp_path, "SGD", "NeedsClosure", "ConsumesGradients", "--optimizer-args", "lr=0.1")
    plain, closure, consumes = (entry["train"]["loss"] for entry in result["runs"])
    assert plain == closure == consumes


def test_what_an_optimizer_draws_does_not_depend_on_earlier_runs(tmp_path: Path) -> None:
    compare(tmp_path, "a=Noisy", "b=Noisy", steps=3)
    assert Special.calls[:3] == Special.calls[3:]
    assert len(set(Special.calls)) == 3


def test_backend_comes_from_the_optimizers_report() -> None:
    class Reporting(torch.optim.SGD):
        report = argparse.Namespace(backend="triton")

    task = make_task()
    record = Run("r", "Reporting")
    train.train(Reporting, task, record, train.Hooks())
    assert (record.backend, record.status) == ("triton", "completed")


def make_task(steps: int = 2) -> train.Task:
    block = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    corpus = data.Corpus("text", block, block, "")
    device = torch.device("cpu")
    source = ModelSource("gpt", lambda: GPT(TINY), {"size": "nano"})
    text = data.TextData(corpus, TINY.context)
    return train.Task.build(source, text, batch_size=2, steps=steps, eval_every=1, seed=0, device=device)


# ------------------------------------------------------------------------------------------------- what may go wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Adamw"], "no optimizer is named 'Adamw'; did you mean 'AdamW'?"),
        (["SGD", "AdamW", "--optimizer-args", "AdamW:beta=1"], "AdamW: TypeError"),
        (["SGD", "--optimizer-args", "lr=-1"], "SGD: ValueError: Invalid learning rate: -1"),
        (["SGD", "SGD"], "used twice"),
        (["SGD", "--device", "abacus"], "--device abacus"),
        (["SGD", "--device", "meta"], "--device meta"),
        (["SGD", "--data", "/no/such/file"], "--data /no/such/file: No such file"),
        (["SGD", "--data", __file__ + "/.."], "--data"),
    ],
)
def test_unusable_arguments_are_one_line_and_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    parsed = parse(*words, "--out", str(tmp_path / "out"), "--steps", "2")
    parsed.data = parsed.data or str(tmp_path / "text")
    assert run(parsed, resolve=resolve) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hbcore compare: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_out_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(parse("SGD", "--out", str(tmp_path / "text")), resolve=resolve) == 2
    assert "--out" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = compare(tmp_path, "SGD", "Interrupted", "AdamW", "--eval-every", "2")
    assert status == 130
    assert [(entry["label"], entry["status"]) for entry in result["runs"]] == [
        ("SGD", "completed"),
        ("Interrupted", "partial"),
    ]
    partial = result["runs"][1]
    assert not partial["completed"]
    assert len(partial["train"]["loss"]) == 5
    assert partial["summary"]["final_val_step"] == 4
    assert "partial, step 5" in capsys.readouterr().out
    assert (tmp_path / "compare.png").exists()


def test_ctrl_c_before_the_first_step_still_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupt)
    status, result = compare(tmp_path, "SGD")
    assert (status, result["runs"]) == (130, [])


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_real_sigint(tmp_path: Path) -> None:
    code = (
        "import argparse, sys, torch; from hbcore.cli.compare import add_arguments, run; p = argparse.ArgumentParser();"
        "add_arguments(p); sys.exit(run(p.parse_args(), resolve=lambda name: getattr(torch.optim, name)))"
    )
    words = ["AdamW", "--steps", "1000", "--threads", "1", "--out", str(tmp_path), "--data", str(tmp_path / "text")]
    with subprocess.Popen(
        [sys.executable, "-u", "-c", code, *words, "--batch-size", "1"],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background ignores it
    ) as process:
        assert process.stdout is not None
        while "step  100" not in (line := process.stdout.readline()):
            assert line
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
        assert process.wait() == 130
    assert "stopped at step" in output
    assert json.loads((tmp_path / "compare.json").read_text())["runs"][0]["status"] == "partial"


def test_a_diverged_run_stops_early_and_the_next_goes_on(tmp_path: Path) -> None:
    words = ["SGD", "AdamW", "--optimizer-args", "SGD:lr=1e30"]
    status, result = compare(tmp_path, *words)
    sgd, adamw = result["runs"]
    assert status == 0
    assert (sgd["status"], adamw["status"]) == ("diverged", "completed")
    assert len(sgd["train"]["loss"]) < 5
    assert sgd["train"]["loss"][-1] is None or sgd["validation"]["loss"][-1] is None
    assert sgd["summary"]["final_val_loss"] is None


def test_an_optimizer_that_raises_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, result = compare(tmp_path, "Broken", "SGD")
    assert status == 1
    assert [entry["status"] for entry in result["runs"]] == ["failed", "completed"]
    assert result["runs"][0]["error"] == "RuntimeError: no such kernel"
    assert "no such kernel" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["matplotlib", "rich"])
def test_without_the_cli_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: missing == "rich", raising=False)
    status, result = compare(tmp_path, "SGD", steps=2)
    captured = capsys.readouterr()
    assert status == 0
    assert "val loss" in captured.out
    assert result["runs"][0]["completed"]
    assert 'pip install "hbcore[cli]"' in captured.err
    assert (tmp_path / "compare.png").exists() == (missing == "rich")
