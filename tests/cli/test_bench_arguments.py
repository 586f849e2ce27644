"""``hbcore bench`` with arguments that cannot work: one line, status 2, and nothing was measured."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hbcore.cli import bench
from hbcore.cli.bench import command
from hbcore.cli.main import main
from hbcore.errors import OptionError, UnknownOptimizerError


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["AdamW", "--dtypes", "fp8"], "--dtypes: expected some of fp32, bf16, bf16\\+fp32state, got fp8"),
        (["AdamW", "--dtypes", "none"], "got none"),
        (["AdamW", "--shapes", "none"], "no shape set"),
        (["AdamW", "--device", "abacus"], "--device abacus"),
        (["AdamW", "AdamW"], "used twice"),
        (["AdamW", "--core", "9999"], r"--core 9999: this process may use the cores \d"),
        (["AdamW", "--core", "-1"], "--core -1: this process may use"),
        (["AdamW", "--compile", "foo"], r"AdamW \[foo\]: AdamW: compile='foo' is not one of auto, triton, cpp, inductor"),
        (["torch.optim:Adagrad", "--compile", "eager"], "torch.optim:Adagrad has no option 'compile'"),
        (["AdamW", "--optimizer-args", "lr=-1"], r"AdamW: AdamW, parameter group 0: lr=-1 is outside"),
        (["AdamW", "--optimizer-args", "nope=1"], "AdamW: AdamW has no option 'nope'"),
        (["torch.optim:SGD", "--optimizer-args", "lr=-1"], "torch.optim:SGD: ValueError: Invalid learning rate"),
        (["json:loads"], "'json:loads' is a function, not a subclass of torch.optim.Optimizer"),
        (["json:JSONDecoder"], "'json:JSONDecoder' is a class, not a subclass"),
        (["os:path"], "'os:path' is a module, not a subclass"),
        (["Parallel"], "'Parallel' is a class, not a subclass"),
        (["SplitOpt"], "SplitOpt: "),
        (["SAMWrapper"], "SAMWrapper: its steps need a closure"),
        (["AdamW", "--out", "/dev/null/x"], "--out /dev/null/x"),
    ],
)
def test_unusable_arguments_fail_before_anything_is_measured(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "measure_ceilings", None)  # the first measurement
    with pytest.raises((OptionError, UnknownOptimizerError), match=message):
        bench.run(parse(*words))
    assert main(["bench", *words]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("hbcore: ") and out.err.count("\n") == 1
