"""Hydra: optimizers by path, by name, and with their parameters to come."""

from __future__ import annotations

import pickle

import pytest
import torch

pytest.importorskip("hydra", reason="needs hydra-core")

from hydra.utils import instantiate
from omegaconf import OmegaConf
from trainers import jobs

import hbcore

CONFIGS = {
    "by path": "{_target_: hb_adam.AdamW, _partial_: true, lr: 0.02, betas: [0.8, 0.9]}",
    "from hbcore": "{_target_: hbcore.AdamW, _partial_: true, lr: 0.02, betas: [0.8, 0.9]}",
    "by name": "{_target_: hbcore.create, _partial_: true, name: AdamW, lr: 0.02, betas: [0.8, 0.9]}",
}


@pytest.mark.parametrize("how", CONFIGS)
def test_an_optimizer_with_its_parameters_to_come(how):
    make = instantiate(OmegaConf.create(CONFIGS[how]))
    model = jobs.net()
    optimizer = make(params=model if how == "by name" else model.named_parameters())
    assert type(optimizer) is hbcore.get("AdamW")
    [group] = optimizer.param_groups
    assert group["lr"] == 0.02 and tuple(group["betas"]) == (0.8, 0.9) and group["param_names"]


def test_a_class_by_name():
    assert instantiate({"_target_": "hbcore.get", "name": "SOAP"}) is hbcore.get("SOAP")


def test_parameters_given_at_once():
    optimizer = instantiate({"_target_": "hb_muon.Muon", "lr": 0.02}, jobs.net().parameters())
    assert type(optimizer) is hbcore.get("Muon")


def test_several_optimizers_for_one_model():
    specs = [{"optimizer": "Muon", "match": ["*.weight"], "lr": 0.02}, {"optimizer": "AdamW", "lr": 0.001}]
    config = OmegaConf.create({"_target_": "hbcore.SplitOpt", "_partial_": True, "specs": specs})
    optimizer = instantiate(config)(list(jobs.net().named_parameters()))
    assert [type(child).__name__ for child in optimizer.children] == ["Muon", "AdamW"]


@pytest.mark.parametrize("convert", ["none", "all"])
def test_what_a_config_put_into_groups_is_saved_as_plain_data(convert, tmp_path):
    """OmegaConf's lists and numbers are classes of its own, which neither ``weights_only`` nor another program reads."""
    config = OmegaConf.create({"lr": 0.02, "betas": [0.8, 0.9], "_target_": "hb_adam.AdamW", "_convert_": convert})
    model = jobs.net()
    optimizer = instantiate(config, model.named_parameters())
    for x, y in jobs.batches(1):
        (model(x) - y).square().mean().backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    assert torch.load(tmp_path / "saved.pt", weights_only=True)["param_groups"][0]["betas"] == (0.8, 0.9)
    assert b"omegaconf" not in pickle.dumps(optimizer)
