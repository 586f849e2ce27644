"""``hbcore migrate``: what it prints, what it writes, and what it leaves alone."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from migrate.fixtures import FOLDER, load, parameters

import hbcore
from hbcore.cli.main import main
from hbcore.migrate import files

ADAMW = str(FOLDER / "3.2.1" / "AdamW.pt")


def failure(capsys, *words):
    assert main(["migrate", *map(str, words)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error


def test_a_training_checkpoint_is_rewritten(tmp_path, capsys):
    out = tmp_path / "out.pt"
    assert main(["migrate", ADAMW, str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())  # lines fit the terminal
    assert "by heavyball, is now AdamW's" in text
    assert "resume with AdamW(params, warmup_steps=9, weight_decay=0.1)" in text
    assert "times 1 - beta^t" in text
    content = torch.load(out, weights_only=True)
    torch.testing.assert_close(content["model"], load("3.2.1", "AdamW")["model"], rtol=0, atol=0)
    optimizer = hbcore.AdamW(parameters(content), warmup_steps=9, weight_decay=0.1)
    optimizer.load_state_dict(content["optimizer"])
    assert float(optimizer.state_dict()["state"][0]["step"]) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["out.pt"]


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out.pt"
    assert main(["migrate", ADAMW, str(out), "--dry-run"]) == 0
    assert "would become AdamW's" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())
    assert main(["migrate", ADAMW, "--dry-run", "--json", "-"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["source"], facts["optimizer"], facts["written"]) == ("heavyball", "AdamW", None)
    assert {note["kind"] for note in facts["notes"]} <= {"mapped", "dropped", "assumed"}


def test_an_existing_file_is_replaced_only_by_force(tmp_path, capsys):
    out = tmp_path / "out.pt"
    out.write_text("precious")
    out.chmod(0o640)
    assert "pass --force" in failure(capsys, ADAMW, out)
    assert out.read_text() == "precious"
    assert main(["migrate", ADAMW, str(out), "--force"]) == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert "hbcore" in torch.load(out, weights_only=True)["optimizer"]["param_groups"][0]


def test_a_file_may_replace_itself(tmp_path):
    path = tmp_path / "both.pt"
    path.write_bytes((FOLDER / "3.2.1" / "AdamW.pt").read_bytes())
    assert main(["migrate", str(path), str(path), "--force"]) == 0
    assert "hbcore" in torch.load(path, weights_only=True)["optimizer"]["param_groups"][0]


def test_a_write_that_fails_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert "No space left" in failure(capsys, ADAMW, tmp_path / "out.pt")
    assert not list(tmp_path.iterdir())


def test_options_and_weights_are_passed_on(tmp_path, capsys):
    source, model = str(FOLDER / "3.2.1" / "SFAdamW.pt"), tmp_path / "model.pt"
    torch.save(load("3.2.1", "SFAdamW")["model"], model)
    assert "pass the model's state dict with --model" in failure(capsys, source, "--dry-run")
    out = tmp_path / "out.pt"
    assert main(["migrate", source, str(out), "--model", str(model), "--option", "caution=true"]) == 0
    assert "SFAdamW(params, caution=True)" in " ".join(capsys.readouterr().out.split())
    assert main(["migrate", source, "--dry-run", "--model", source, "--model-key", "model"]) == 0
    group = torch.load(out, weights_only=True)["optimizer"]["param_groups"][0]
    assert group["param_names"] == ["weight.0", "weight.1", "weight.2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the file to write"),
        (["--dry-run", "--to", "AdamX"], "AdamX"),
        (["--dry-run", "--to", "SOAP"], "convert it for AdamW"),
        (["--dry-run", "--from", "pytorch"], "no library that hbcore converts from"),
        (["--dry-run", "--key", "optimizer.nowhere"], "there is no 'nowhere'"),
        (["--dry-run", "--key", "model"], "recognised"),
        (["--dry-run", "--option", "nonsense=1"], "no option 'nonsense'"),
        (["--dry-run", "--option", "lr"], "expected KEY=VALUE"),
        (["--dry-run", "--model", "/nowhere"], "No such file"),
        (["/nowhere/out.pt"], "there is no such folder"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert message in failure(capsys, ADAMW, *words)


def test_the_state_is_found_where_trainers_keep_it(tmp_path):
    state_dict = load("3.2.1", "AdamW")["optimizer"]
    for content in (
        state_dict,
        {"optimizer_state_dict": state_dict, "epoch": 3},
        {"state_dict": {}, "optimizer_states": [state_dict]},
    ):
        assert files.find(content).state_dict is state_dict
        assert files.replaced(files.find(content), 1) == files.replaced(files.Found(content, files.find(content).path, None), 1)
    with pytest.raises(hbcore.CheckpointError, match=r"--key: optimizer_states\.0, optimizer_states\.1"):
        files.find({"optimizer_states": [state_dict, state_dict]})
