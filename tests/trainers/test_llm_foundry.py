"""LLM Foundry finds our classes by entry points, and makes them as its ``build_optimizer`` does."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from trainers import jobs

import hbcore

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("hb_adam", "hb_muon", "hb_psgd", "hb_soap")
GROUP = "llmfoundry_optimizers"


def published(family):
    project = tomllib.loads((ROOT / "plugins" / family / "pyproject.toml").read_text())["project"]
    return project["entry-points"][GROUP]


def entry(name):
    [value] = [names[name] for names in map(published, FAMILIES) if name in names]
    return EntryPoint(name, value, GROUP)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_optimizer_that_steps_without_a_closure_has_an_entry(family):
    specs = importlib.import_module(f"{family}.plugin").hb_optimizers(None)
    steps = [spec.name for spec in specs if "closure" not in spec.capabilities]
    assert published(family) == {f"hb_{name.lower()}": f"{family}:{name}" for name in steps}
    for name in steps:
        cls = entry(f"hb_{name.lower()}").load()
        assert cls is hbcore.get(name) and issubclass(cls, torch.optim.Optimizer), "its registry takes classes alone"


def test_no_name_is_taken_twice():
    names = [name for family in FAMILIES for name in published(family)]
    assert len(names) == len(set(names)) and all(name.startswith("hb_") for name in names)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_optimizer_is_made_of_a_config_and_the_models_parameters(grouped):
    """Without groups in the config it hands over a generator; with some, a view of a dict, and lists."""
    model = jobs.net()
    params = model.parameters()
    if grouped:
        left = dict(model.named_parameters())
        biases = [left.pop(name) for name in list(left) if name.endswith("bias")]
        params = [{"params": left.values()}, {"params": biases, "weight_decay": 0.0}]
    optimizer = entry("hb_adamw").load()(**{"lr": 0.02, "betas": [0.9, 0.95], "weight_decay": 0.1}, params=params)
    assert [group["weight_decay"] for group in optimizer.param_groups] == ([0.1, 0.0] if grouped else [0.1])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    for x, y in jobs.batches(1):
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert len(optimizer.state) == 6
