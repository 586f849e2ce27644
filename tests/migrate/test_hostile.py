"""Files and state dicts that are not what they should be: one line that says so, nothing run, nothing half done."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from migrate.fixtures import FOLDER, load

from hbcore.checkpoint.foreign import is_heavyball
from hbcore.cli.main import main
from hbcore.errors import CheckpointError, HbcoreError
from hbcore.migrate import files
from hbcore.migrate.apply import migrate


class Runs:
    """Creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def saved(path, content, **how):
    torch.save(content, path, **how)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_run(tmp_path, capsys, zipped):
    marker = tmp_path / "marker"
    content = {"optimizer": {"state": Runs(marker), "param_groups": []}}
    evil = saved(tmp_path / "evil.pt", content, _use_new_zipfile_serialization=zipped)
    assert main(["migrate", str(evil), str(tmp_path / "out.pt"), "--to", "AdamW"]) == 2
    error = capsys.readouterr().err
    assert "mkdir would have to be imported" in error
    assert "nothing in it was executed" in error
    assert error.count("\n") == 1
    assert not marker.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pt"]


def test_names_of_heavyball_are_no_way_in(tmp_path):
    class Sneaky:
        def __reduce__(self):
            return pickle.loads, (pickle.dumps(Runs(tmp_path / "marker")),)

    Sneaky.__module__ = "heavyball"
    with pytest.raises(CheckpointError, match="refused"):
        files.read(saved(tmp_path / "evil.pt", {"a": Sneaky()}))
    assert not (tmp_path / "marker").exists()


def test_pickles_within_a_checkpoint_stay_bytes(tmp_path):
    marker = tmp_path / "marker"
    content = load("3.2.1", "AdamW")
    content["optimizer"]["heavyball"]["precond_schedule"] = pickle.dumps(Runs(marker))
    migrate(files.read(saved(tmp_path / "evil.pt", content))["optimizer"])
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, kept):
    whole = (FOLDER / "3.2.1" / "AdamW.pt").read_bytes()
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"cut\.pt"):
        files.read(path)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(3), "text", 7, None, {}, {"model": {}}, {"optimizer": [1]}])
def test_what_is_no_state_dict_is_refused(tmp_path, content, capsys):
    path = saved(tmp_path / "in.pt", content)
    assert main(["migrate", str(path), str(tmp_path / "out.pt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out.pt").exists()


def changed(edit):
    state_dict = copy.deepcopy(load("3.2.1", "AdamW")["optimizer"])
    edit(state_dict)
    return state_dict


def first(state_dict):
    return state_dict["state"][0][0]


AVG, SQ = "update_by_adam_exp_avg_0", "update_by_adam_exp_avg_sq_0"
BROKEN = {
    "nan": (lambda s: first(s)[AVG].fill_(float("nan")), "NaN or infinite"),
    "huge": (lambda s: first(s).update({AVG: torch.zeros(1).expand(2**40, 2**20)}), "has memory for 1"),
    "meta": (lambda s: first(s).update({AVG: torch.ones(3, device="meta")}), "no plain tensor"),
    "sparse": (lambda s: first(s).update({AVG: torch.ones(2, 2).to_sparse()}), "no plain tensor"),
    "integers": (lambda s: first(s).update({AVG: first(s)[AVG].long()}), "no tensor of floats"),
    "text": (lambda s: first(s).update({AVG: "moments"}), "no tensor of floats"),
    "shapes": (lambda s: first(s).update({SQ: torch.ones(9)}), r"has the shape \(9,\)"),
    "missing": (lambda s: first(s).pop(SQ), "no 'exp_avg_sq'"),
    "no-groups": (lambda s: s.update(param_groups=[]), "recognised"),
    "bad-groups": (lambda s: s.update(param_groups=[7]), "recognised"),
    "no-params": (lambda s: s["param_groups"][0].pop("params"), "no list of 'params'"),
    "no-state": (lambda s: s.update(state=None), "'state'"),
    "state-list": (lambda s: s["state"].update({0: [1]}), "expected a dict"),
    "views": (lambda s: s["state"].update({0: {5: first(s)}}), "has the views"),
    "step": (lambda s: s["param_groups"][0].update(step_count=-3), "count of steps"),
    "step-nan": (lambda s: s["param_groups"][0].update(step_count=float("nan")), "count of steps"),
    "betas": (lambda s: s["param_groups"][0].update(betas=(0.9, 7.0)), "betas"),
    "lr": (lambda s: s["param_groups"][0].update(lr="fast"), "lr"),
    "lr-nan": (lambda s: s["param_groups"][0].update(lr=float("nan")), "lr"),
    "several": (lambda s: s.update(optimizers=[]), "several optimizers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_state_dicts_are_refused(case):
    edit, message = BROKEN[case]
    with pytest.raises(HbcoreError, match=message):
        migrate(changed(edit))


def test_containers_within_themselves_are_refused():
    state_dict = changed(lambda s: None)
    state_dict["state"][0][0]["loop"] = state_dict
    with pytest.raises(CheckpointError, match="contains itself"):
        migrate(state_dict)


@pytest.mark.parametrize(
    "value", [None, 3, "x", [], {}, {"param_groups": 3}, {"param_groups": [None]}, {"wrapped": {"wrapped": 1}}]
)
def test_recognising_never_raises(value):
    assert not is_heavyball(value)
