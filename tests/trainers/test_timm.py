"""timm's factory makes our optimizers once they are registered, with its groups and its arguments."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from trainers import jobs

import hbcore

if importlib.util.find_spec("timm") is None:
    pytest.skip("needs timm", allow_module_level=True)


def importable():
    try:
        importlib.import_module("timm")
    except Exception as error:  # a torchvision that was built for another torch raises RuntimeError
        return f"timm's models need a torchvision that fits torch: {error}"
    return ""


REASON = importable()


def factory():
    """timm's module of optimizers; without torchvision, which only its models need, apart from them."""
    if REASON:
        timm = types.ModuleType("timm")
        timm.__path__ = importlib.util.find_spec("timm").submodule_search_locations
        models = types.ModuleType("timm.models")
        models.group_parameters = None  # for decay by layers, which asks a model of timm's
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            del sys.modules[name]
        sys.modules.update({"timm": timm, "timm.models": models})
    return importlib.import_module("timm.optim._optim_factory")


@pytest.fixture(scope="module")
def optim():
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "timm"}
    module = factory()
    for name in ("AdamW", "MuonAdamW", "SOAP"):
        cls = hbcore.get(name)
        module.default_registry.register(module.OptimInfo(f"hb{name}", cls, "hbcore's", has_betas=True))
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        del sys.modules[name]
    sys.modules.update(before)


def net():
    return torch.nn.Sequential(*jobs.net(), torch.nn.LayerNorm(3))


@pytest.mark.filterwarnings("ignore:MuonAdamW. the parameters have no names")
@pytest.mark.parametrize("name", ["AdamW", "MuonAdamW", "SOAP"])
def test_the_factory_makes_groups_and_passes_options(optim, name):
    model = net()
    optimizer = optim.create_optimizer_v2(model, f"hb{name}", lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), caution=True)
    assert type(optimizer) is hbcore.get(name)
    decay = {
        n: group["weight_decay"]
        for group in optimizer.param_groups
        for n, p in model.named_parameters()
        for q in group["params"]
        if p is q
    }
    assert decay == {n: 0.1 if p.ndim > 1 else 0.0 for n, p in model.named_parameters()}
    assert optimizer.settings.caution and {g["lr"] for g in optimizer.param_groups} == {0.02}
    for x, y in jobs.batches(2):
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.filterwarnings("error")
def test_the_fallback_list_says_which_matrices_are_adamws(optim):
    """timm hands over no names; its patterns become ``use_fallback`` in groups, which MuonAdamW reads."""
    model = net()
    optimizer = optim.create_optimizer_v2(model, "hbMuonAdamW", lr=0.02, weight_decay=0.1, fallback_list=["4.*"])
    by_muon = [p for group in optimizer.param_groups if group["use_muon"] for p in group["params"] if p.ndim > 1]
    assert [tuple(p.shape) for p in by_muon] == [(8, 6), (8, 8)]


def test_named_parameters_go_straight_through(optim):
    model = net()
    optimizer = optim.create_optimizer_v2(list(model.named_parameters()), "hbAdamW", lr=0.02)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_model_of_timms_trains():
    import timm

    model = timm.create_model("test_vit", num_classes=2)
    optimizer = hbcore.create("MuonAdamW", model, lr=0.01)
    before = model.head.weight.detach().clone()
    model(torch.randn(2, 3, 160, 160)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)
