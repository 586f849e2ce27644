"""SplitOpt: each parameter once, to the first spec that takes it; one optimizer object, one state dict."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from core.kit import backward, mlp, same, values
from torch import nn

import hbcore
from hb_adam import SGD, AdamW, SFAdamW
from hb_muon import Muon
from hbcore import CheckpointError, OptionError, ParameterError, SplitOpt


def is_matrix(p):
    return p.ndim > 1


SPECS = [
    {"optimizer": "AdamW", "match": "3.*", "lr": 0.02},
    {"optimizer": Muon, "when": is_matrix, "lr": 0.05},
    {"optimizer": "SGD", "lr": 0.1},
]


def train(model, optimizer, steps):
    for t in steps:
        backward(model, t)
        optimizer.step()


def test_each_parameter_moves_as_its_optimizer_alone_would_move_it():
    model, alone = mlp(), mlp()
    optimizer = SplitOpt(model.named_parameters(), SPECS)
    named = dict(alone.named_parameters())
    single = [
        AdamW([p for n, p in named.items() if n.startswith("3.")], lr=0.02),
        Muon([named["0.weight"]], lr=0.05),
        SGD([named[n] for n in ("0.bias", "2.weight", "2.bias")], lr=0.1),
    ]
    for t in range(4):
        backward(model, t)
        for a, b in zip(model.parameters(), alone.parameters(), strict=True):
            b.grad = a.grad.clone()
        optimizer.step()
        for one in single:
            one.step()
    assert same(model.parameters(), alone.parameters())
    assert sorted(p for g in optimizer.param_groups for p in g["param_names"]) == sorted(named)


def test_groups_may_name_their_optimizer():
    model = mlp()
    weights, biases = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    optimizer = SplitOpt([{"params": weights, "optimizer": Muon, "lr": 0.05}, {"params": biases, "optimizer": "AdamW"}])
    assert [type(child) for child in optimizer.children] == [Muon, AdamW]
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 4]
    train(model, optimizer, range(2))


def test_repr_says_who_has_what():
    text = repr(SplitOpt(mlp().named_parameters(), SPECS))
    assert "Muon: 1 parameters, 96 elements: 0.weight (16, 6)" in text and "SGD: 3 parameters" in text and "AdamW" in text


def test_schedulers_and_wrappers_reach_the_optimizers_inside():
    model = mlp()
    optimizer = SplitOpt(model.named_parameters(), SPECS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t else 1.0)
    train(model, optimizer, [0])
    scheduler.step()
    before = values(model.parameters())
    train(model, optimizer, [1])
    assert same(model.parameters(), before)
    optimizer.param_groups = [{**g, "lr": 0.1} for g in optimizer.param_groups]  # as some wrappers do
    train(model, optimizer, [2])
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_one_state_dict_that_resumes_exactly():
    model = mlp()
    optimizer = SplitOpt(model.named_parameters(), SPECS)
    train(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert sorted(saved["optimizer"]["state"]) == list(range(6))
    other = mlp(1)
    other.load_state_dict(saved["model"])
    resumed = SplitOpt(other.named_parameters(), SPECS)
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert same(model.parameters(), other.parameters())


def test_a_load_that_fails_in_one_changes_none():
    model = mlp()
    optimizer = SplitOpt(model.named_parameters(), SPECS)
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(before)
    broken["param_groups"][0]["lr"] = 9.0
    del broken["param_groups"][2]["params"]
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict(broken)
    assert optimizer.param_groups[0]["lr"] == 0.02
    with pytest.raises(CheckpointError, match="1 param groups, the optimizer 3"):
        optimizer.load_state_dict({"state": {}, "param_groups": before["param_groups"][:1]})


def test_hooks_see_the_state_dict_and_the_step():
    model, seen = mlp(), []
    optimizer = SplitOpt(model.named_parameters(), SPECS)
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "mine": 1})
    optimizer.register_step_post_hook(lambda *a: seen.append(1))
    train(model, optimizer, [0])
    assert optimizer.state_dict()["mine"] == 1 and seen == [1]


def test_copies_and_pickles_step_alike():
    model = mlp()
    optimizer = SplitOpt(model.named_parameters(), SPECS)
    train(model, optimizer, range(2))
    for pair in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        twin = copy.deepcopy((model, optimizer))
        train(*pair, [2])
        train(*twin, [2])
        assert same(pair[0].parameters(), twin[0].parameters())


def test_late_groups_go_the_same_way():
    optimizer = SplitOpt(mlp().named_parameters(), SPECS)
    late = nn.Linear(3, 3)
    optimizer.add_param_group({"params": list(late.named_parameters()), "lr": 0.3})
    assert [len(c.param_groups) for c in optimizer.children] == [1, 2, 2]
    assert [g["lr"] for g in optimizer.param_groups[3:]] == [0.3, 0.3]
    late(torch.ones(3)).sum().backward()
    optimizer.step()
    assert sorted(optimizer.state_dict()["state"]) == list(range(8))


def test_a_group_that_its_optimizer_splits_is_there_in_whole():
    optimizer = SplitOpt(mlp().named_parameters(), [{"optimizer": "MuonAdamW"}])
    optimizer.add_param_group({"params": list(nn.Linear(3, 3).named_parameters())})
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 4, 1, 1]


def test_modes_are_forwarded():
    model = mlp()
    optimizer = SplitOpt(model.named_parameters(), [{"optimizer": SFAdamW, "when": is_matrix, "lr": 0.1}, {"optimizer": "SGD"}])
    train(model, optimizer, range(3))
    before = values(model.parameters())
    optimizer.eval()
    assert not same(model.parameters(), before)
    optimizer.eval()
    optimizer.train()
    assert same(model.parameters(), before)


@pytest.mark.parametrize(
    ("specs", "error", "says"),
    [
        ([{"optimizer": "Muon", "when": is_matrix}], ParameterError, "no spec takes 0.bias of shape .* neither match nor when"),
        ([{"optimizer": "Muon", "match": "x"}, {"optimizer": "SGD"}], ParameterError, r"spec 0 \(Muon\) takes no parameter"),
        ([{"lr": 1}], OptionError, "spec 0 must be a dict with an 'optimizer'"),
        ([{"optimizer": torch.optim.SGD}], OptionError, "not an hbcore optimizer class"),
        (
            [{"optimizer": "AdamW", "when": is_matrix, "gradient_clipping": "global_l2norm_clip"}, {"optimizer": "SGD"}],
            OptionError,
            "would see one optimizer's parameters",
        ),
    ],
)
def test_what_cannot_be_is_refused(specs, error, says):
    with pytest.raises(error, match=says):
        SplitOpt(mlp().named_parameters(), specs)


def test_patterns_need_names():
    with pytest.raises(ParameterError, match=r"pass model\.named_parameters"):
        SplitOpt(mlp().parameters(), SPECS)


def test_its_names():
    assert hbcore.get("SplitOpt") is SplitOpt
    with pytest.warns(FutureWarning, match="SplitOptimizer is now SplitOpt"):
        hbcore.registry.Registry().get("SplitOptimizer")
