"""``hbcore compare --resume``: an interrupted comparison ends as an uninterrupted one, to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import hbcore
from hbcore.cli import compare
from hbcore.cli.compare import resume
from hbcore.cli.compare.data import TextData, load_corpus
from hbcore.cli.compare.inputs import ModelSource
from hbcore.cli.compare.model import GPT, GPTConfig
from hbcore.cli.compare.record import Run
from hbcore.cli.compare.task import Task
from hbcore.cli.compare.train import Hooks, train

TINY = GPTConfig(dim=16, depth=1, heads=2, context=16)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("hbcore.cli.compare.plot.draw", lambda *_: None)


def of_torch(name: str) -> Any:
    return getattr(torch.optim, name)


def stops_at(step: int, why: type[BaseException] = KeyboardInterrupt) -> Any:
    """A name -> class as :func:`of_torch`, whose Adam raises in its ``step``-th step."""

    class Stops(torch.optim.Adam):
        taken = 0

        def step(self, closure: Any = None) -> Any:
            type(self).taken += 1
            if type(self).taken == step:
                raise why
            return super().step(closure)

    return lambda name: Stops if name == "Adam" else of_torch(name)


def numbers(result: dict[str, Any]) -> list[Any]:
    """All that does not depend on the clock."""
    keys = ("label", "seed", "lr", "lr_from", "trials", "status", "norms")
    every = []
    for run in result["runs"]:
        every.append([*(run[key] for key in keys), run["train"]["loss"], run["validation"]["step"], run["validation"]["loss"]])
    return every


WORDS = ("SGD", "Adam", "AdamW", "--seeds", "2", "--eval-every", "3", "--optimizer-args", "lr=0.01")


def test_ctrl_c_and_resume_end_as_if_nothing_had_happened(tiny_run, capsys):
    assert tiny_run(compare, *WORDS, resolve=of_torch, steps=10) == 0
    whole = tiny_run.json()
    assert not (tiny_run.folder / resume.NAME).exists()
    assert tiny_run(compare, *WORDS, resolve=stops_at(8), steps=10) == 130
    assert [run["status"] for run in tiny_run.json()["runs"]] == ["completed", "partial"]
    assert (tiny_run.folder / resume.NAME).exists()
    capsys.readouterr()
    assert tiny_run(compare, *WORDS, "--resume", resolve=of_torch, steps=10) == 0
    again = tiny_run.json()
    assert numbers(again) == numbers(whole)
    assert [run["resumed"] for run in again["runs"]] == [[], [6], [], [], [], []]
    out = capsys.readouterr().out
    assert "Adam, seed 0   goes on after step 6" in out and "SGD, seed 0    step" not in out
    assert not (tiny_run.folder / resume.NAME).exists()
    assert tiny_run(compare, *WORDS, "--resume", resolve=stops_at(1), steps=10) == 0, "nothing is left to train"
    assert numbers(tiny_run.json()) == numbers(whole)


def test_random_numbers_go_on_where_they_were(tiny_run):
    class Noisy(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad += torch.randn_like(p)
            return super().step(closure)

    def noisy(step: int) -> Any:
        class Both(Noisy, stops_at(step)("Adam")):  # type: ignore[misc]
            pass

        return lambda name: Both

    words = ("Noisy", "--eval-every", "2")
    assert tiny_run(compare, *words, resolve=lambda name: Noisy) == 0
    whole = numbers(tiny_run.json())
    assert tiny_run(compare, *words, resolve=noisy(6)) == 130
    assert tiny_run(compare, *words, "--resume", resolve=noisy(0)) == 0
    assert numbers(tiny_run.json()) == whole


def test_more_seeds_and_optimizers_may_be_added(tiny_run):
    few = [*WORDS[:1], "--optimizer-args", "lr=0.01"]
    assert tiny_run(compare, *few, resolve=of_torch) == 0
    assert tiny_run(compare, "Adam", *few, "--seeds", "2", "--resume", resolve=of_torch) == 0
    added = tiny_run.json()
    assert tiny_run(compare, "Adam", *few, "--seeds", "2", resolve=of_torch) == 0
    assert numbers(added) == numbers(tiny_run.json())


def test_a_tuned_rate_survives(tiny_run):
    words = ("Adam", "--tune", "2", "--seeds", "2", "--eval-every", "2")
    assert tiny_run(compare, *words, resolve=of_torch) == 0
    whole = numbers(tiny_run.json())
    assert tiny_run(compare, *words, resolve=stops_at(2 * 2 + 5)) == 130
    assert tiny_run(compare, *words, "--resume", resolve=of_torch) == 0
    assert numbers(tiny_run.json()) == whole


def test_a_failed_run_is_tried_again(tiny_run):
    assert tiny_run(compare, "SGD", "Adam", resolve=stops_at(3, RuntimeError)) == 1
    assert tiny_run(compare, "SGD", "Adam", "--resume", resolve=of_torch) == 0
    assert [run["status"] for run in tiny_run.json()["runs"]] == ["completed", "completed"]


def test_resuming_nothing_begins(tiny_run):
    assert tiny_run(compare, "SGD", "--resume", resolve=of_torch) == 0


@pytest.mark.parametrize(
    ("words", "given", "says"),
    [
        (["SGD"], {"steps": 9}, "its steps is 8, not 9"),
        (["SGD", "--seed", "1"], {}, "its weights is"),
        (["SGD", "--norms-every", "3"], {}, "its norms_every is 1, not 3"),
        (["SGD"], {"batch_size": "5"}, "its batches is"),
        (["Adam"], {}, "also has a run SGD (seed 0, lr 0.001), which this comparison would drop"),
        (["SGD", "--optimizer-args", "lr=0.5"], {}, "also has a run SGD"),
        (["SGD", "--optimizer-args", "momentum=0.5"], {}, "also has a run SGD"),
    ],
)
def test_another_comparison_is_refused_and_kept(tiny_run, capsys, words, given, says):
    assert tiny_run(compare, "SGD", resolve=of_torch) == 0
    before = (tiny_run.folder / "compare.json").read_bytes()
    capsys.readouterr()
    assert tiny_run(compare, *words, "--resume", resolve=of_torch, **given) == 2
    assert says in capsys.readouterr().err
    assert (tiny_run.folder / "compare.json").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"schema": "hbcore.compare/1", "runs": []}', b"\xff\xfe"])
def test_a_json_that_is_no_comparison_is_refused_and_kept(tiny_run, capsys, content):
    path = tiny_run.folder / "compare.json"
    path.write_bytes(content)
    assert tiny_run(compare, "SGD", "--resume", resolve=of_torch) == 2
    assert "cannot be resumed" in capsys.readouterr().err
    assert path.read_bytes() == content


@pytest.mark.parametrize("harm", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 100])
def test_a_damaged_checkpoint_costs_its_run_only(tiny_run, capsys, harm):
    words = ("SGD", "Adam", "--eval-every", "2")
    assert tiny_run(compare, *words, resolve=of_torch) == 0
    whole = numbers(tiny_run.json())
    assert tiny_run(compare, *words, resolve=stops_at(5)) == 130
    path = tiny_run.folder / resume.NAME
    path.write_bytes(harm(path.read_bytes()))
    assert tiny_run(compare, *words, "--resume", resolve=of_torch) == 0
    assert "could not be read" in capsys.readouterr().err
    assert numbers(tiny_run.json()) == whole
    assert tiny_run.json()["runs"][1]["resumed"] == []


def test_a_state_that_cannot_be_saved_costs_the_checkpoint_only(tiny_run, capsys):
    class Odd(torch.optim.SGD):
        def state_dict(self) -> Any:
            return super().state_dict() | {"handle": lambda: None}

    assert tiny_run(compare, "Odd", resolve=lambda name: Odd) == 0
    assert "could not be written" in capsys.readouterr().err
    assert not list(tiny_run.folder.glob("*.unfinished")) and not (tiny_run.folder / resume.NAME).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_process_that_is_killed(tiny_run, capsys):
    """SIGKILL leaves no time to write anything."""
    code = (
        "import sys; from hbcore.cli.compare import data, model; from hbcore.cli.main import main;"
        "data.VALIDATION_WINDOWS = 8; model.SIZES['nano'] = model.GPTConfig(16, 1, 2, 16); sys.exit(main(sys.argv[1:]))"
    )
    words = ["SGD", "AdamW", "--eval-every", "5", "--threads", "1"]
    given = [
        "--steps",
        "60",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--data",
        str(tiny_run.text),
        "--out",
        str(tiny_run.folder),
    ]
    command = [sys.executable, "-u", "-c", code, "compare", *words, *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "AdamW  step 30" not in (line := process.stdout.readline()):
            assert line
        os.kill(process.pid, signal.SIGKILL)
    assert [run["status"] for run in tiny_run.json()["runs"]] == ["completed"]
    assert tiny_run(compare, *words, "--resume", steps=60) == 0
    out = capsys.readouterr().out
    assert "goes on after step" in out and "SGD    step" not in out
    again = tiny_run.json()
    assert tiny_run(compare, *words, steps=60) == 0
    assert numbers(again) == numbers(tiny_run.json())


KINDS = {
    "AdamW": {"ecc": "int8", "param_ecc": "bf16+8", "stochastic_rounding": True},
    "SFAdamW": {"warmup_steps": 3},
    "SAMWrapper": {},
    "MuonAdamW": {"use_ema": True},
    "PSGDKron": {},
}
NAMES = [n for n in hbcore.list_optimizers() if "sparse" not in hbcore.info(n).spec.capabilities]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "options"), [*KINDS.items(), *(pytest.param(n, {}, marks=pytest.mark.broad) for n in NAMES)], ids=str
)
def test_every_kind_of_optimizer_goes_on_bit_for_bit(tiny_run: Any, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    text = TextData(load_corpus(str(tiny_run.text), TINY.context), TINY.context)
    source = ModelSource("gpt", lambda: GPT(TINY), {"size": "nano"})
    task = Task.build(source, text, batch_size=2, steps=6, eval_every=3, seed=0, device=torch.device("cpu"), norms_every=2)
    factory = partial(hbcore.get(name), compile="eager", **options)
    checkpoint, whole, half = resume.Checkpoint(tmp_path / "c", {}), Run("r", name), Run("r", name)
    train(factory, task, whole, Hooks(save=partial(checkpoint.save, whole)))
    torch.rand(7)  # whatever happens in between
    saved = checkpoint.load(half)
    assert saved is not None and saved["done"] == 3 == len(half.steps)
    train(factory, task, half, Hooks(), saved)
    assert [step.loss for step in half.steps] == [step.loss for step in whole.steps]
    assert (half.norms, half.norm_names, half.status) == (whole.norms, whole.norm_names, whole.status)
    assert [p.loss for p in half.validations] == [p.loss for p in whole.validations]
