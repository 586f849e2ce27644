"""``hbcore.cast_model``: a model in 16 bits, but for what normalises."""

from __future__ import annotations

import pytest
import torch
from core.kit import KINDS
from torch import nn

import hbcore
from hbcore.errors import OptionError, ParameterError

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class ScaleNorm(nn.Module):
    """Another library's, with something inside that does not normalise."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)


class Renamed(nn.LayerNorm):
    """A subclass of another name."""


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))


def dtypes(model):
    return {name: t.dtype for name, t in model.state_dict().items()}


MODULES = {
    "linear": (lambda: nn.Linear(4, 4), {"weight": BF16, "bias": BF16}),
    "layer": (lambda: nn.LayerNorm(4), {"weight": F32, "bias": F32}),
    "rms": (lambda: nn.RMSNorm(4), {"weight": F32}),
    "group": (lambda: nn.GroupNorm(2, 4), {"weight": F32, "bias": F32}),
    "batch": (
        lambda: nn.BatchNorm2d(4),
        {"weight": F32, "bias": F32, "running_mean": F32, "running_var": F32, "num_batches_tracked": torch.int64},
    ),
    "renamed": (lambda: Renamed(4), {"weight": F32, "bias": F32}),
    "half": (lambda: nn.LayerNorm(4).half(), {"weight": F32, "bias": F32}),
    "others": (ScaleNorm, {"gain": F32, "inner.weight": BF16, "inner.bias": BF16}),
    "odd": (Odd, {"z": torch.complex64, "index": torch.int64, "wide": BF16}),
}


@pytest.mark.parametrize("case", MODULES)
def test_what_is_cast_and_what_is_kept(case):
    make, wanted = MODULES[case]
    model = make()
    values = {name: t.clone() for name, t in model.state_dict().items()}
    assert hbcore.cast_model(model) is model
    assert dtypes(model) == wanted
    assert all(torch.equal(t, values[name].to(t.dtype)) for name, t in model.state_dict().items())


KEEPS = {
    "nothing": (None, set()),
    "a module": ("head", {"head.weight", "head.bias"}),
    "a pattern": (["*.bias"], {"body.bias", "head.bias"}),
    "a parameter": (lambda name, x: name == "body.weight", {"body.weight"}),
    "a class": (lambda _, x: isinstance(x, nn.Embedding), {"embed.weight"}),
}


@pytest.mark.parametrize("case", KEEPS)
def test_the_user_says_what_else_is_kept(case):
    keep, kept = KEEPS[case]
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 3)})
    lines = []
    hbcore.cast_model(model, F16, keep=keep, report=lines.append)
    assert {name for name, dtype in dtypes(model).items() if dtype == F32} == kept
    assert set(dtypes(model).values()) <= {F16, F32}
    assert lines[0].startswith(f"cast {5 - len(kept)} parameters of ") and lines[0].endswith(f"kept {len(kept)}")
    assert {line.split()[1] for line in lines[1:]} == kept


def test_tied_parameters_stay_tied_and_are_kept_if_one_of_them_is():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model["b"].weight, model["b"].bias = model["a"].weight, model["norm"].bias
    weight = model["a"].weight
    weight.grad = torch.ones(4, 4)
    hbcore.cast_model(model)
    assert model["a"].weight is model["b"].weight is weight and weight.dtype == weight.grad.dtype == BF16
    assert model["b"].bias is model["norm"].bias and model["b"].bias.dtype == F32


@pytest.mark.parametrize("options", [{}, {"param_ecc": "bf16+8", "ecc": "bf16+8"}], ids=str)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_trains_a_model_of_two_dtypes(name, options):
    torch.manual_seed(0)
    model = hbcore.cast_model(nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)))
    assert set(dtypes(model).values()) == {BF16, F32}
    optimizer = hbcore.create(name, model, compile="eager", **options)
    x = torch.randn(32, 6)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = (model(x).float() - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and all(t.isfinite().all() for t in model.state_dict().values())


def test_it_refuses_what_it_would_break():
    with pytest.raises(OptionError, match=r"dtype=torch\.float64"):
        hbcore.cast_model(nn.Linear(2, 2), torch.float64)
    model = nn.Linear(2, 2)
    loss = model(torch.ones(2)).sum()
    with pytest.raises(ParameterError, match="cast the model first, then wrap it"):
        hbcore.cast_model(model)
    assert loss.dtype == model.weight.dtype == F32
