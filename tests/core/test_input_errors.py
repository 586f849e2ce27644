"""Bad input is refused at once, with a type that torch's users expect and a message that says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from core.kit import parameters, run, same, values
from torch import nn

from hb_adam import SGD, AdamW
from hbcore.errors import HyperparameterError, OptionError, ParameterError, ParameterTypeError

NAN = float("nan")


def one():
    return [nn.Parameter(torch.zeros(3))]


# settings, what the message must hold: the value, the range, the remedy
NUMBERS = [
    ({"lr": -1}, [r"lr=-1", r"\[0, inf\)", "pass"]),
    ({"lr": NAN}, ["lr=nan", r"\[0, inf\)", "pass"]),
    ({"lr": "0.1"}, ["lr='0.1'", r"\[0, inf\)", "pass"]),
    ({"lr": True}, ["lr=True", "pass"]),
    ({"lr": torch.tensor(-1.0)}, [r"lr=-1", r"\[0, inf\)", "pass"]),
    ({"lr": torch.zeros(2)}, ["lr", r"\(2,\)", "pass one"]),
    ({"betas": (1.0, 0.9)}, [r"betas\[0\]=1\.0", r"\[0, 1\)", "pass"]),
    ({"betas": (0.9, -0.1)}, [r"betas\[1\]=-0\.1", r"\[0, 1\)", "pass"]),
    ({"betas": (0.9, NAN)}, [r"betas\[1\]=nan", r"\[0, 1\)", "pass"]),
    ({"betas": (torch.tensor(1.5), 0.9)}, [r"betas\[0\]=1\.5", r"\[0, 1\)", "pass"]),
    ({"betas": (0.9,)}, [r"betas=\(0\.9,\)", "2", "pass"]),
    ({"betas": 0.9}, [r"betas=0\.9", "2", "pass"]),
    ({"eps": -1e-8}, ["eps=-1e-08", r"\[0, inf\)", "pass"]),
    ({"weight_decay": -0.1}, [r"weight_decay=-0\.1", r"\[0, inf\)", "pass"]),
    ({"warmup_steps": -5}, ["warmup_steps=-5", r"\[0, inf\)", "pass"]),
]


def assert_says(error, wanted):
    for pattern in wanted:
        error.match(pattern)


@pytest.mark.parametrize(("settings", "wanted"), NUMBERS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_number_out_of_range_is_refused(settings, wanted):
    with pytest.raises(HyperparameterError) as at_once:
        AdamW(one(), **settings)
    assert_says(at_once, ["AdamW", *wanted])
    assert isinstance(at_once.value, ValueError)
    with pytest.raises(HyperparameterError) as in_a_group:
        AdamW([{"params": one()}, {"params": one(), **settings}])
    assert_says(in_a_group, ["group 1", *wanted])


def test_a_group_that_is_refused_is_not_added():
    params = one()
    optimizer = AdamW(params)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(HyperparameterError):
        optimizer.add_param_group({"params": one(), "lr": -1})
    with pytest.raises(ParameterError):
        optimizer.add_param_group({"params": params})
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_numbers_from_numpy_are_numbers():
    import numpy as np

    optimizer = AdamW(one(), lr=np.float32(0.5), betas=(np.float64(0.9), 0.99), warmup_steps=np.int64(3))
    [params, twins] = [optimizer.param_groups[0]["params"], one()]
    run(optimizer, params, [[torch.ones(3)]])
    run(AdamW(twins, lr=0.5, betas=(0.9, 0.99), warmup_steps=3), twins, [[torch.ones(3)]])
    assert torch.equal(params[0], twins[0])


p = nn.Parameter(torch.zeros(2, 3))
leaf = nn.Parameter(torch.zeros(3))
BAD_PARAMS = {
    "empty": (lambda: [], ParameterError, ValueError, ["empty", "model.parameters"]),
    "exhausted": (lambda: iter(()), ParameterError, ValueError, ["empty", "model.parameters"]),
    "bare tensor": (lambda: torch.zeros(3), ParameterTypeError, TypeError, ["FloatTensor", r"\[tensor\]"]),
    "string": (lambda: "weights", ParameterTypeError, TypeError, ["str", "pass"]),
    "number": (lambda: 3, ParameterTypeError, TypeError, ["int", "pass"]),
    "not a tensor": (lambda: [p, "bias"], ParameterTypeError, TypeError, ["entry 1", "str"]),
    "mixed": (lambda: [{"params": [p]}, leaf], ParameterTypeError, TypeError, ["entry 1|group 1", "Parameter"]),
    "set": (lambda: [{"params": {p}}], ParameterTypeError, TypeError, ["set", "list"]),
    "no params": (lambda: [{"lr": 1.0}], ParameterError, ValueError, ["group 0", "'params'", "lr"]),
    "twice in a list": (lambda: [p, leaf, p], ParameterError, ValueError, ["number 2", "number 0", r"\(2, 3\)", "once"]),
    "twice across groups": (
        lambda: [{"params": [p]}, {"params": [leaf, p]}], ParameterError, ValueError,
        ["number 1 of group 1", "number 0 of group 0", "once"],
    ),
    "twice by name": (lambda: [("a", p), ("b", p)], ParameterError, ValueError, ["'b'", "'a'", "once"]),
    "integer": (lambda: [torch.zeros(3, dtype=torch.int64)], ParameterError, ValueError, ["int64", "number 0", "pass"]),
    "no leaf": (lambda: [leaf * 2], ParameterError, ValueError, ["non-leaf", "number 0", "Pass the leaf"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PARAMS)
@pytest.mark.parametrize("cls", [AdamW, SGD])
def test_unusable_parameters_are_refused(cls, case):
    params, error, builtin, wanted = BAD_PARAMS[case]
    with pytest.raises(error) as raised:
        cls(params())
    assert isinstance(raised.value, builtin)
    assert_says(raised, wanted)


@pytest.mark.parametrize("added", [lambda: {"params": [leaf]}, lambda: {"params": leaf}, lambda: {"params": [p, leaf]}])
def test_a_parameter_may_not_be_added_twice(added):
    optimizer = AdamW([("first", leaf)])
    with pytest.raises(ParameterError, match="same tensor as parameter 'first'"):
        optimizer.add_param_group(added())
    assert len(optimizer.param_groups) == 1


def test_a_group_must_be_a_dict():
    with pytest.raises(TypeError, match="dict"):
        AdamW(one()).add_param_group(one())


OPTIONS = [
    ({"weight_deacy": 0.1}, ["weight_deacy", "did you mean 'weight_decay'"]),
    ({"betass": (0.9, 0.9)}, ["betass", "did you mean 'betas'"]),
    ({"zzz": 1}, ["zzz", "it takes", "caution"]),
    ({"amsgraad": 1}, ["amsgraad"]),
    ({"stochastic_schedule": True}, ["stochastic_schedule", "removed", "pass"]),
    ({"adaptive": True}, ["adaptive", "removed", "pass"]),
    ({"division_backend": "eps"}, ["division_backend='eps'", "eps_add, eps_clamp", "pass"]),
    ({"compile": "fast"}, ["compile='fast'", "auto", "inductor", "eager"]),
    ({"storage_dtype": "int8"}, ["storage_dtype='int8'", "bfloat16", "pass"]),
    ({"storage_dtype": "nonsense"}, ["storage_dtype='nonsense'", "bfloat16", "pass"]),
    ({"storage_dtype": torch.int32}, ["storage_dtype=torch.int32", "bfloat16", "pass"]),
]


@pytest.mark.parametrize(("settings", "wanted"), OPTIONS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_an_option_that_does_not_exist_is_refused(settings, wanted):
    with pytest.raises(OptionError) as raised:
        AdamW(one(), **settings)
    assert isinstance(raised.value, TypeError)
    assert_says(raised, wanted)


def test_an_option_of_the_whole_optimizer_is_refused_in_a_group():
    with pytest.raises(OptionError, match=r"caution.*group"):
        AdamW([{"params": one(), "caution": True}])


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(OptionError, match="cautious_weight_decay"):
        SGD(one(), decoupled_weight_decay=False, cautious_weight_decay=True)


@pytest.mark.parametrize("spelling", ["foreach", "fused"])
def test_torchs_spelling_of_multi_tensor_is_taken_with_a_warning(spelling):
    with pytest.warns(FutureWarning, match=f"{spelling}=False.*multi_tensor=False") as caught:
        optimizer = AdamW(one(), **{spelling: False})
    assert optimizer.settings.multi_tensor is False
    assert caught[0].filename == __file__


def test_a_sparse_gradient_is_refused_and_nothing_changes():
    torch.manual_seed(0)
    embedding, other = nn.Embedding(5, 3, sparse=True), parameters()[0]
    optimizer = AdamW([("other", other), ("table", embedding.weight)])
    embedding(torch.tensor([1, 2])).sum().backward()
    other.grad = torch.ones_like(other)
    before = values([other, embedding.weight])
    with pytest.raises(ParameterError, match=r"'table'.*sparse.*sparse=False") as raised:
        optimizer.step()
    assert isinstance(raised.value, RuntimeError)  # as in torch.optim
    assert same([other, embedding.weight], before)
