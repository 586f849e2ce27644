"""``hbcore.memory``: the bytes it foretells are those of a live optimizer."""

from __future__ import annotations

import pytest
import torch
from core.kit import one_of_each
from torch import nn

import hbcore
from hbcore import SplitOpt
from hbcore.errors import OptionError, ParameterError
from hbcore.testing import Subject

pytestmark = pytest.mark.filterwarnings("ignore:.*(param_ecc|max_lr|no names)")

SHAPES = ((64, 32), (32,), (4, 3, 5), (6, 1))


def model(device="cpu"):
    with torch.device(device):
        made = nn.Module()
        for i, shape in enumerate(SHAPES):
            made.register_parameter(f"p{i}", nn.Parameter(torch.ones(shape)))
    return made


def held(optimizer, params):
    """The bytes of the distinct tensors in the state, but for the step counters."""
    found = {}
    for p in params:
        for name, t in optimizer.state[p].items():
            if name != "step" and isinstance(t, torch.Tensor):
                found[t.untyped_storage().data_ptr(), t.storage_offset(), t.shape] = t.nbytes
    return sum(found.values())


@pytest.mark.parametrize("param_ecc", [None, "bf16+8"])
@pytest.mark.parametrize("ecc", [None, "bf16+8", "bf16+16"])
@pytest.mark.parametrize("name", [*one_of_each(sorted({*hbcore.list_optimizers()} - {"PSGDLRA"})), "PSGDLRA"])
def test_it_is_what_a_live_optimizer_holds(name, ecc, param_ecc):
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, {"compile": "eager"})
    trial = subject.loose(*SHAPES, ecc=ecc, param_ecc=param_ecc)
    foretold = hbcore.memory([nn.Parameter(torch.empty(s, device="meta")) for s in SHAPES], name, ecc=ecc, param_ecc=param_ecc)
    trial.train(1)
    params = [p for group in trial.optimizer.param_groups for p in group["params"]]
    assert foretold.elements == sum(p.numel() for p in params)
    assert foretold.parameters == foretold.gradient == sum(p.nbytes for p in params)
    assert foretold.state == held(trial.optimizer, params)
    assert foretold.state + foretold.derived == sum(slot.bytes for slot in foretold.slots)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_it_allocates_and_changes_nothing(device):
    here = model(device)
    before = {name: (t.dtype, t.device.type, t.data_ptr()) for name, t in here.named_parameters()}
    hbcore.memory(here, "SOAP", param_ecc="bf16+8", ecc="bf16+8")
    assert {name: (t.dtype, t.device.type, t.data_ptr()) for name, t in here.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({}, {"parameters": 4, "gradient": 4, "state": 8, "total": 16}),
        ({"ecc": "bf16+8"}, {"parameters": 4, "gradient": 4, "state": 6, "total": 14}),
        ({"ecc": "bf16+8", "param_ecc": "bf16+8"}, {"parameters": 2, "gradient": 2, "state": 7, "total": 11}),
        ({"storage_dtype": "bfloat16", "use_ema": True}, {"parameters": 4, "gradient": 4, "state": 8, "total": 16}),
        ({"amsgrad": True}, {"parameters": 4, "gradient": 4, "state": 12, "total": 20}),
    ],
    ids=str,
)
def test_bytes_per_parameter_of_adamw(options, each):
    found = hbcore.memory(model("meta"), "AdamW", **options)
    assert {name: found.per_parameter[name] for name in each} == each
    assert found.total == each["total"] * found.elements


def test_the_inputs_of_matrix_rules_are_counted_in_their_dtype():
    assert hbcore.memory(model(), "Muon").stacks == 2 * (64 * 32 + 4 * 15)
    assert hbcore.memory(model(), "Muon", promote=True).stacks == 4 * (64 * 32 + 4 * 15)
    assert hbcore.memory(model(), "AdamW").stacks == 0


def test_frozen_parameters_take_their_own_bytes_alone():
    frozen = model("meta")
    frozen.p0.requires_grad_(False)
    found = hbcore.memory(frozen, "AdamW")
    assert found.parameters - found.gradient == 4 * 64 * 32
    assert found.state == 2 * found.gradient


def test_several_optimizers_as_one_are_counted_together():
    specs = [{"optimizer": "SGD", "when": lambda p: p.ndim > 1, "momentum": 0.9}, {"optimizer": "AdamW", "ecc": "bf16+8"}]
    found = hbcore.memory(model("meta"), SplitOpt, specs=specs)
    assert found.state == 4 * (64 * 32 + 4 * 15 + 6) + 6 * 32
    assert {slot.name for slot in found.slots} == {"momentum_buffer", "exp_avg", "exp_avg_sq"}


def test_it_prints_a_table():
    text = str(hbcore.memory(model("meta"), "AdamW", ecc="bf16+8"))
    assert [line.split()[0] for line in text.splitlines()] == [
        "2,146", "parameters", "gradient", "state", "exp_avg", "exp_avg_sq", "derived", "stacks", "total",
    ]  # fmt: skip
    assert "exp_avg (bfloat16, int8)" in text and f"{14 * 2146:,}" in text


def test_what_it_cannot_know_is_refused():
    with pytest.raises(OptionError, match="hbcore's engine"):
        hbcore.memory(model(), torch.optim.AdamW)
    with pytest.raises(ParameterError, match="run the model once"):
        hbcore.memory(nn.LazyLinear(3))
