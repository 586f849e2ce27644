"""MuonAdamW: who goes where, each part's own rule, and that the split survives groups, schedules, copies and checkpoints."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from core.kit import distance, gradients, parameters, run, same
from reference.adamw import adamw
from reference.muon import muon
from torch import nn

import hb_muon.rules
import hbcore
from hb_muon import Muon, MuonAdamW
from hbcore.errors import CheckpointError

SHAPES = {
    "embed.weight": (11, 6), "0.weight": (6, 4), "0.bias": (4,), "1.weight": (6, 4), "1.gain": (), "lm_head.weight": (9, 6),
}  # fmt: skip
MATRICES = ("0.weight", "1.weight")
OTHERS = ("embed.weight", "0.bias", "1.gain", "lm_head.weight")
EAGER = {"compile": "eager"}


def named(shapes=SHAPES, dtype=torch.float64):
    return dict(zip(shapes, parameters(list(shapes.values()), dtype), strict=True))


def parts(optimizer):
    return [(group["use_muon"], group["param_names"]) for group in optimizer.param_groups]


def train(optimizer, params, steps=6, skip=0):
    every = list(gradients(steps, [p.shape for p in params.values()], next(iter(params.values())).dtype))
    run(optimizer, list(params.values()), every[skip:])


def test_each_part_agrees_with_its_own_oracle():
    params, start = named(), named()
    settings = {"betas": (0.7, 0.9), "eps": 0.01, "weight_decay": 0.3, "warmup_steps": 2}
    train(MuonAdamW(params.items(), lr=0.05, momentum=0.8, adamw_lr=0.01, **settings, **EAGER), params)
    columns = dict(zip(SHAPES, zip(*gradients(6, list(SHAPES.values()), torch.float64), strict=True), strict=True))
    for name, p in params.items():
        at, grads = start[name].detach().numpy(), [g.numpy() for g in columns[name]]
        hidden = name in MATRICES
        oracle = muon(at, grads, lr=0.05, momentum=0.8, **settings) if hidden else adamw(at, grads, lr=0.01, **settings)
        assert distance([p], [torch.tensor(oracle)]) < 1e-12, name


def test_the_adamw_part_is_adamw_bit_for_bit():
    from hb_adam import AdamW

    options = {"lr": 0.01, "weight_decay": 0.1, "mars": True, "caution": True, **EAGER}
    params, others = named(), {k: p for k, p in named().items() if k in OTHERS}
    optimizer, reference = MuonAdamW(params.items(), momentum=0.5, **options), AdamW(others.items(), **options)
    for grads in gradients(6, list(SHAPES.values()), torch.float64):
        run(optimizer, list(params.values()), [grads])
        run(reference, list(others.values()), [[g for k, g in zip(SHAPES, grads, strict=True) if k in OTHERS]])
    assert same([params[k] for k in OTHERS], others.values())


def test_exactly_the_routed_matrices_are_orthogonalized(monkeypatch):
    seen = []
    original = hb_muon.rules.orthogonalize_stacks

    def counting(stacks, *settings):
        seen.extend(tuple(u.shape[-2:]) for stack in stacks for u in stack)
        return original(stacks, *settings)

    monkeypatch.setattr(hb_muon.rules, "orthogonalize_stacks", counting)
    params = named()
    optimizer = MuonAdamW(params.items(), **EAGER)
    train(optimizer, params, 1)
    assert sorted(seen) == sorted(SHAPES[name] for name in MATRICES)
    assert {name for name, p in params.items() if "momentum_buffer" in optimizer.state[p]} == set(MATRICES)
    assert {name for name, p in params.items() if "exp_avg_sq" in optimizer.state[p]} == set(OTHERS)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("transformer.wte.weight", False),
        ("transformer.wpe.weight", False),
        ("transformer.h.0.attn.c_attn.weight", True),
        ("transformer.h.0.mlp.c_fc.weight", True),
        ("lm_head.weight", False),
        ("module.lm_head.weight", False),
        ("_orig_mod.head.weight", False),
        ("module._orig_mod.fc.weight", False),
        ("layers.0._checkpoint_wrapped_module.feed_forward.w1.weight", True),
        ("model.embed_tokens.weight", False),
        ("tok_embeddings.weight", False),
        ("output.weight", False),
        ("shared.weight", False),
        ("tok_emb.weight", False),
        ("pos_emb", False),
        ("patch_embed.proj.weight", False),
        ("heads.head.weight", False),
        ("sa.heads.0.key.weight", True),
        ("encoder.layer.0.attention.output.dense.weight", True),
        ("layer4.1.conv2.weight", True),
        ("fc.weight", False),
        ("classifier.6.weight", False),
        ("to_logits.weight", False),
    ],
)
def test_which_names_are_embeddings_and_last_layers(name, hidden):
    extra = nn.Parameter(torch.ones(2, 3))
    assert (name in dict(parts(MuonAdamW([(name, nn.Parameter(torch.ones(4, 3))), ("hidden", extra)])))[True]) is hidden


def test_without_names_every_matrix_is_for_muon_with_a_warning():
    params = named()
    with pytest.warns(UserWarning, match=r"no names, so all 4 matrices go to Muon.*pass model\.named_parameters\(\)"):
        optimizer = MuonAdamW(params.values(), **EAGER)
    assert [(g["use_muon"], len(g["params"])) for g in optimizer.param_groups] == [(True, 6)]
    assert "Muon: 4 parameters, 168 of 173 elements" in repr(optimizer)
    assert "AdamW: 2 parameters, 5 of 173 elements" in repr(optimizer)
    train(optimizer, params, 1)
    assert {name for name, p in params.items() if "exp_avg_sq" in optimizer.state[p]} == {"0.bias", "1.gain"}


@pytest.mark.parametrize("key", [{"use_muon": False}, {"use_fallback": True}], ids=str)
def test_groups_that_say_which_matrices_are_adamws_need_no_names(key, recwarn):
    """timm marks its fallbacks alone."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    MuonAdamW([{"params": list(model[0].parameters())}, {"params": list(model[1].parameters()), **key}])
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:MuonAdamW. the parameters have no names")
@pytest.mark.parametrize(
    ("group", "shapes", "rows"),
    [
        ({}, [(4,)], [(True, 0.1, 1)]),
        ({}, [(4, 3)], [(True, 0.1, 1)]),
        ({"lr": 0.3}, [(4,), (4, 3)], [(True, 0.3, 2)]),
        ({"use_muon": True}, [(4,), (4, 3)], [(True, 0.1, 2)]),
        ({"use_muon": False}, [(4,), (4, 3)], [(False, 0.1, 2)]),
        ({"use_muon": False}, [(4,)], [(False, 0.1, 1)]),
        ({"use_muon": False}, [], [(False, 0.1, 0)]),
        ({}, [], [(True, 0.1, 0)]),
        ({"adamw_lr": 0.2}, [(4,), (4, 3)], [(True, 0.1, 1), (False, 0.2, 1)]),
    ],
    ids=str,
)
def test_a_group_without_names_stays_one_unless_adamw_has_a_rate_of_its_own(group, shapes, rows):
    optimizer = MuonAdamW([{"params": [nn.Parameter(torch.ones(shape)) for shape in shapes], **group}], lr=0.1)
    assert [(g["use_muon"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == rows


def halved(saved, **rest):
    """A checkpoint with one group, as 0.1.0 wrote it: the matrices first, then the rest."""
    [group] = copy.deepcopy(saved["param_groups"])
    record = json.loads(group["hbcore"])
    frozen = record.pop("frozen", [])
    halves = [[k for k in group["params"] if ("exp_avg_sq" in saved["state"].get(k, "")) is way] for way in (False, True)]
    groups = []
    for way, keys in zip((True, False), halves, strict=True):
        mine = [i for i, k in enumerate(keys) if group["params"].index(k) in frozen]
        text = json.dumps({**record, "frozen": mine} if mine else record)
        groups.append({**group, "params": keys, "use_muon": way, "hbcore": text, **(rest if not way else {})})
    return {**saved, "param_groups": groups}


@pytest.mark.filterwarnings("ignore:MuonAdamW. the parameters have no names")
class TestCheckpointsOfTwoGroups:
    """Nameless groups were split before; what was saved then loads into groups that stay one."""

    SHAPES = ((4,), (6, 4), (5,), (3, 5), (2, 3))

    def build(self, values, frozen=()):
        params = [nn.Parameter(v.detach().clone()) for v in values]
        for i in frozen:
            params[i].requires_grad_(False)
        return params, MuonAdamW([{"params": params}], lr=0.1, **EAGER)

    def train(self, params, optimizer, steps):
        trained = [p for p in params if p.requires_grad]
        run(optimizer, trained, list(gradients(6, [p.shape for p in trained]))[steps])

    @pytest.mark.parametrize("frozen", [(), (3,)], ids=str)
    def test_they_resume_exactly(self, frozen):
        params, optimizer = self.build(parameters(list(self.SHAPES)), frozen)
        self.train(params, optimizer, slice(0, 3))
        saved = halved(optimizer.state_dict())
        assert [g["params"] for g in saved["param_groups"]] == [[1, 3, 4], [0, 2]]
        others, other = self.build(params)
        other.load_state_dict(saved)
        for i in frozen:
            others[i].requires_grad_(False)
        for each in ((params, optimizer), (others, other)):
            self.train(*each, slice(3, 6))
        assert same(others, params)

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda saved: saved["param_groups"][1].update(lr=0.7), "2 param groups, the optimizer 1"),
            (lambda saved: saved["param_groups"][1].update(use_muon=True), "2 param groups, the optimizer 1"),
            (lambda saved: saved["param_groups"][1]["params"].pop(), "2 param groups, the optimizer 1"),
            (lambda saved: saved["param_groups"].insert(1, None), "3 param groups, the optimizer 1"),
            (lambda saved: saved["param_groups"].append(saved["param_groups"][1]), "2 param groups, the optimizer 1"),
            (lambda saved: saved["param_groups"][0].update(hbcore="{"), "is not hbcore's"),
        ],
    )
    def test_others_are_refused(self, spoil, said):
        params, optimizer = self.build(parameters(list(self.SHAPES)))
        self.train(params, optimizer, slice(0, 1))
        saved = halved(optimizer.state_dict())
        spoil(saved)
        with pytest.raises(CheckpointError, match=said):
            optimizer.load_state_dict(saved)


def test_groups_are_split_in_order_and_keep_what_they_set():
    p = named()
    groups = [
        {"params": [(k, p[k]) for k in ("lm_head.weight", "1.weight", "0.bias")], "lr": 0.3, "weight_decay": 0.1},
        {"params": [("0.weight", p["0.weight"])], "use_muon": False, "lr": 0.4},
        {"params": [("embed.weight", p["embed.weight"]), ("1.gain", p["1.gain"])], "use_muon": True, "adamw_lr": 0.5},
    ]
    optimizer = MuonAdamW(groups, lr=0.1, adamw_lr=0.2)
    rows = [(g["use_muon"], g["param_names"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert rows == [
        (True, ["1.weight"], 0.3, 0.1),
        (False, ["lm_head.weight", "0.bias"], 0.2, 0.1),
        (False, ["0.weight"], 0.4, 0.0),
        (True, ["embed.weight"], 0.1, 0.0),
        (False, ["1.gain"], 0.5, 0.0),
    ]
    again = MuonAdamW([{k: v for k, v in g.items() if k != "hbcore"} for g in optimizer.param_groups])
    assert parts(again) == parts(optimizer)
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert MuonAdamW([{"params": list(p.items()), "lr": 0.3}], lr=0.1).param_groups[1]["lr"] == 0.3


def test_late_groups_are_split_too_or_not_added_at_all():
    p = named()
    optimizer = MuonAdamW([("0.weight", p["0.weight"])], **EAGER)
    optimizer.add_param_group({"params": (entry for entry in p.items() if entry[0] not in ("0.weight", "1.weight", "1.gain"))})
    assert parts(optimizer) == [(True, ["0.weight"]), (False, ["embed.weight", "0.bias", "lm_head.weight"])]
    for bad in (
        {"params": [("1.weight", p["1.weight"]), ("0.bias", p["0.bias"])]},  # a duplicate in the second part
        {"params": [("1.weight", p["1.weight"]), ("1.gain", p["1.gain"])], "adamw_lr": -1.0},
        {"params": [("1.weight", p["1.weight"]), ("x", "no tensor")]},
        {"params": {p["1.weight"]}},
        {"lr": 0.1},
    ):
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": [("1.weight", p["1.weight"]), ("1.gain", p["1.gain"])]})
    assert parts(optimizer)[2:] == [(True, ["1.weight"]), (False, ["1.gain"])]
    train(optimizer, p, 2)


def test_complex_matrices_are_adamws():
    p = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    optimizer = MuonAdamW([("z", p), ("w", nn.Parameter(torch.ones(3, 4)))], **EAGER)
    assert parts(optimizer) == [(True, ["w"]), (False, ["z"])]


def test_a_scheduler_scales_both_rates():
    optimizer = MuonAdamW(named().items(), lr=0.1, adamw_lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.005]


def test_resuming_and_copying_change_no_bit():
    params = named()
    optimizer = MuonAdamW(params.items(), lr=0.05, adamw_lr=0.01, adamw_patterns=["0.*"], **EAGER)
    train(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [g["param_names"] for g in saved["param_groups"]] == [g["param_names"] for g in optimizer.param_groups]
    resumed = {k: nn.Parameter(p.detach().clone()) for k, p in params.items()}
    other = MuonAdamW(resumed.items(), adamw_patterns="0.*", **EAGER)
    other.load_state_dict(saved)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin = {name: p for g in copied.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}
        twin = {name: twin[name] for name in params}
        train(copied, twin, 6, 3)
        copied.add_param_group({"params": [("0.more", nn.Parameter(torch.ones(2, 2))), ("2", nn.Parameter(torch.ones(2, 2)))]})
        assert [(g["use_muon"], g["lr"], g["param_names"]) for g in copied.param_groups[2:]] == [
            (True, 0.05, ["2"]),
            (False, 0.01, ["0.more"]),
        ]
    train(optimizer, params, 6, 3)
    train(other, resumed, 6, 3)
    assert same(twin.values(), params.values())
    assert same(resumed.values(), params.values())


def test_the_routing_is_printed():
    text = repr(MuonAdamW(named().items()))
    assert "Muon: 2 parameters, 48 of 173 elements; (6, 4) x 2; 0.weight, 1.weight" in text
    assert "AdamW: 4 parameters, 125 of 173 elements; (11, 6) x 1, (4,) x 1, () x 1, (9, 6) x 1; embed.weight, 0.bias" in text
    assert text.startswith("MuonAdamW (")
    plain = repr(Muon(named().values()))
    assert "Muon: 4 parameters, 168 of 173 elements" in plain
    assert "Adam: 2 parameters, 5 of 173 elements" in plain


def test_a_model_whose_matrices_all_go_to_adamw_warns_where_it_is_built():
    vectors = nn.Parameter(torch.ones(4))
    with pytest.warns(
        UserWarning, match=r"all matrices go to AdamW; 2 match .*\(embed\.weight, lm_head\.weight\); pass"
    ) as caught:
        MuonAdamW([(k, p) for k, p in named().items() if k in OTHERS])
    assert len(caught) == 1 and caught[0].filename == __file__
    MuonAdamW([("bias", vectors)])  # no matrix
    MuonAdamW([{"params": [("0.weight", named()["0.weight"])], "use_muon": False}])  # as it was asked
    MuonAdamW([("embed.weight", named()["embed.weight"])], adamw_patterns=())


class Block(nn.Module):
    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(width, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.skip(x))


class ResNet(nn.Module):
    """ResNet-18's plan at an eighth of its width."""

    def __init__(self, classes=10):
        super().__init__()
        widths = (8, 8, 16, 32, 64)
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.layers = nn.Sequential(*(nn.Sequential(Block(a, b, 1 + (a < b)), Block(b, b, 1)) for a, b in pairwise(widths)))
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        return self.fc(self.layers(self.conv1(x)).mean((2, 3)))


def test_over_95_percent_of_a_convolutional_resnet_are_muons():
    torch.manual_seed(0)
    model = ResNet()
    optimizer = MuonAdamW(model.named_parameters(), **EAGER)
    sizes = {g["use_muon"]: sum(p.numel() for p in g["params"]) for g in optimizer.param_groups}
    assert sizes[True] / sum(sizes.values()) > 0.95
    assert {n.split(".")[0] for n in optimizer.param_groups[1]["param_names"]} == {"layers", "fc"}  # gains, biases, the head
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_names_and_defaults():
    defaults = MuonAdamW(named().items()).defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"], defaults["nesterov"]) == (0.0025, (0.9, 0.99), 1e-8, True)
    assert set(MuonAdamW.own) - set(Muon.own) == {"adamw_lr", "adamw_patterns"}
    assert set(Muon.own) <= set(MuonAdamW.own)


def test_embeddings_of_a_model_are_found_whatever_their_names():
    model = nn.ModuleDict({"tokens": nn.Embedding(7, 4), "bag": nn.EmbeddingBag(7, 4), "hidden": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = hbcore.create("MuonAdamW", model, lr=0.1)
    assert sorted(parts(optimizer)) == [
        (False, ["hidden.bias"]),
        (False, ["tokens.weight", "bag.weight"]),
        (True, ["hidden.weight"]),
    ]


@pytest.mark.parametrize("fallback", [True, False])
def test_timms_use_fallback_is_the_opposite_of_use_muon(fallback):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = MuonAdamW([{"params": [nn.Parameter(torch.ones(4, 3))], "use_fallback": fallback}])
    assert optimizer.param_groups[0]["use_muon"] is not fallback


@pytest.mark.parametrize("patterns", [0.5, None, (0.9, "a")], ids=str)
def test_what_is_no_pattern_is_refused(patterns):
    with pytest.raises(hbcore.errors.OptionError, match=r"adamw_patterns=.* is not a list of patterns of names"):
        MuonAdamW(named().items(), adamw_patterns=patterns)
