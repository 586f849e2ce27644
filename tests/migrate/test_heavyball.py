"""What becomes of HeavyBall's checkpoints: they continue as HeavyBall's own optimizers did.

Distances are relative to how far HeavyBall's weights have moved since the checkpoint. Weights of about 1 that move by about
2e-3 in a step are rounded to 6e-8, so that 3e-5 of a first step is rounding, where decay or a norm is computed in another
order; KLShampoo's steps are smaller still.
"""

from __future__ import annotations

import copy

import pytest
import torch
from migrate.fixtures import ALL, BEFORE, CASES, UNTOLD, VERSIONS, converted, distances, load, options_of, parameters, unnamed

import hbcore
from hbcore import registry
from hbcore.errors import CheckpointError
from hbcore.migrate.apply import migrate
from hbcore.migrate.heavyball.factors import symmetric_root

ROUNDING = 2e-4
BOUNDS = {
    "KLSOAP": 0.05,  # 1e-8 of a null space is another number: see tests/soap/test_soap_against_heavyball.py
    "HeavyKLSOAP": 0.05,
    "SOAPSplit": 0.1,  # narrow pieces are vectors to HeavyBall, and have a basis that is refreshed here
    "AdamWPalm": 0.05,  # HeavyBall debiases the second moment again: 2.4%
    "PaLMSFAdamW": 0.05,
    "PaLMSOAP": 0.05,
    "AdamWMars": 0.05,  # HeavyBall swaps gamma and beta in the call
}
UNLIKE = {
    ("1.7.2", "ADOPT"), ("2.3.1", "ADOPT"), ("3.2.1", "ADOPT"),  # it divides by what the paper does not
    ("1.7.2", "Muon"), ("1.7.2", "MuonLaProp"), ("2.3.1", "Scion"),  # other orthogonal factors than release 3's
    ("2.3.1", "MSAMLaProp"),  # a norm for each parameter: with one parameter, release 3's is compared
}  # fmt: skip
"""HeavyBall has another rule there, so that the paths part: docs/differences.md."""


@pytest.mark.parametrize(("version", "name"), ALL)
def test_training_continues_as_in_heavyball(version, name):
    content, done = converted(version, name)
    params = parameters(content)
    optimizer = hbcore.get(done.optimizer)(params, **done.options)
    optimizer.load_state_dict(unnamed(done.state_dict))
    found = distances(optimizer, params, content["path"])
    assert all(torch.isfinite(p).all() for p in params)
    if (version, name) not in UNLIKE:
        assert max(found) < BOUNDS.get(name, ROUNDING)


@pytest.mark.parametrize("name", ["SOAPNAdam", "HeavySOAPNAdam"])
def test_decay_is_decoupled_where_heavyballs_option_says_otherwise_and_does_nothing(name):
    _, done = converted("3.2.1", name)
    assert all(group["decoupled_weight_decay"] for group in done.state_dict["param_groups"])


@pytest.mark.parametrize("version", VERSIONS)
def test_adamw_continues_within_rounding(version):
    content, done = converted(version, "AdamW")
    params = parameters(content)
    optimizer = hbcore.AdamW(params, **done.options)
    optimizer.load_state_dict(unnamed(done.state_dict))
    assert len(content["path"]) == 20
    distances(optimizer, params, content["path"])
    ours = torch.cat([p.detach().reshape(-1) for p in params])
    assert float((ours - content["path"][-1]).norm() / ours.norm()) < 1e-6


@pytest.mark.parametrize(("version", "name"), ALL)
def test_live_optimizers_get_the_same_state(version, name):
    content, done = converted(version, name)
    before = copy.deepcopy(content["optimizer"]["state"])
    live = hbcore.get(done.optimizer)(parameters(content), **done.options)
    untouched = live.state_dict()
    given = hbcore.convert_checkpoint(content["optimizer"], live)
    assert live.state_dict()["state"].keys() == untouched["state"].keys()
    assert str(before) == str(content["optimizer"]["state"]), "the source was changed"
    live.load_state_dict(given)
    for i, entry in live.state_dict()["state"].items():
        for slot, value in entry.items():
            told = done.state_dict["state"][i].get(slot, torch.zeros_like(value))  # RMSprop's momentum, which is new
            torch.testing.assert_close(value, told, rtol=0, atol=0)


def test_every_optimizer_of_both_is_converted():
    heavyball = pytest.importorskip("heavyball", reason="heavyball does not import here", exc_type=ImportError)
    theirs = {n for n in heavyball.__all__ if n[0].isupper()} - {"SplitOpt", "SAMWrapper"}
    assert theirs <= set(CASES["3"])
    assert theirs <= set(registry.list_optimizers())


@pytest.mark.parametrize("version", VERSIONS)
def test_the_optimizer_is_told_by_the_checkpoint(version):
    for name in CASES[version[0]]:
        if not (version[0] == "3" and name in UNTOLD):
            _, done = converted(version, name)
            assert done.optimizer == hbcore.info(CASES[version[0]][name].cls).name


def test_what_is_not_told_is_asked_for():
    with pytest.raises(CheckpointError, match=r"LaProp or SignLaProp .*--to NAME"):
        migrate(load("3.2.1", "SignLaProp")["optimizer"])


def test_another_kind_of_state_is_refused():
    with pytest.raises(CheckpointError, match=r"of SOAP, and AdamW's state means something else: convert it for SOAP"):
        migrate(load("3.2.1", "SOAP")["optimizer"], "AdamW")


def test_old_names_lead_to_the_same_optimizer():
    content = load("1.7.2", "AdamW")
    for name in ("heavyball.ForeachAdamW", "ForeachAdamW", "AdamW", None):
        assert migrate(content["optimizer"], name).optimizer == "AdamW"


def test_moments_are_plain_and_steps_are_counted():
    content, done = converted("3.2.1", "AdamWEcc")
    theirs = load("3.2.1", "LaProp")["optimizer"]["state"][0][0]["update_by_laprop_exp_avg_0"]
    ours = migrate(load("3.2.1", "LaProp")["optimizer"], "LaProp").state_dict["state"][0]
    torch.testing.assert_close(ours["exp_avg"], theirs * (1 - 0.9**BEFORE))
    assert float(ours["step"]) == BEFORE
    assert done.state_dict["state"][0]["exp_avg"].dtype == torch.bfloat16, "ecc is taken over"
    assert content["optimizer"]["param_groups"][0]["ecc"] == done.options["ecc"]


def test_groups_keep_their_numbers():
    state_dict = load("3.2.1", "AdamW")["optimizer"]
    first, rest = state_dict["param_groups"][0], copy.deepcopy(state_dict["param_groups"][0])
    first["params"], rest["params"] = [0], [1, 2]
    rest |= {"lr": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.0}
    state_dict["param_groups"].append(rest)
    groups = migrate(state_dict).state_dict["param_groups"]
    assert [g["lr"] for g in groups] == [0.0025, 0.5]
    assert [g["betas"] for g in groups] == [(0.9, 0.99), (0.8, 0.9)]
    assert [g["params"] for g in groups] == [[0], [1, 2]]


def test_the_report_leaves_nothing_out():
    state_dict = load("2.3.1", "SOAP")["optimizer"]
    state_dict["param_groups"][0] |= {"normalize_grads": True, "my_own": 3}
    state_dict["state"][0][0]["surprise"] = torch.ones(2)
    notes = migrate(state_dict).notes
    assert {n.where for n in notes if n.kind == "dropped"} == {
        "group entry 'normalize_grads'", "group entry 'my_own'", "state 'surprise'",
    }  # fmt: skip
    mapped = {n.where for n in notes if n.kind == "mapped"}
    assert {"state 'Q'", "state 'GG'", "state 'exp_avg'", "state 'exp_avg_sq'", "group entry 'lr'"} <= mapped
    assert len(notes) == len(set(notes))


def test_a_triangular_factor_has_a_symmetric_root():
    q = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).triu()
    root = symmetric_root(q)
    torch.testing.assert_close(root, root.mT)
    torch.testing.assert_close(root @ root, (q.mT @ q).double())
    content = load("3.2.1", "PSGDKron")
    options = {**options_of("3.2.1", "PSGDKron"), "precond_rule": "quad"}
    params = parameters(content)
    optimizer = hbcore.PSGDKron(params, **options)
    optimizer.load_state_dict(hbcore.convert_checkpoint(content["optimizer"], optimizer))
    assert max(distances(optimizer, params, content["path"])) < ROUNDING


def test_averages_and_sums_become_each_other():
    content = load("3.2.1", "Muon")
    live = hbcore.Muon(parameters(content), heavyball_momentum=False)
    sums = content["optimizer"]["state"][0][0]["nesterov_momentum_momentum_2"]
    given = hbcore.convert_checkpoint(content["optimizer"], live)["state"][0]
    torch.testing.assert_close(given["momentum_buffer"], 0.1 * sums)


def test_schedule_free_state_needs_the_weights():
    with pytest.raises(CheckpointError, match=r"relative to the weights: pass .*--model FILE"):
        migrate(load("3.2.1", "SFAdamW")["optimizer"])


def test_a_parameter_without_state_starts_anew():
    state_dict = load("3.2.1", "AdamW")["optimizer"]
    del state_dict["state"][1]
    done = migrate(state_dict)
    assert sorted(done.state_dict["state"]) == [0, 2]
    live = hbcore.AdamW(parameters(load("3.2.1", "AdamW")))
    live.load_state_dict(done.state_dict)
    assert "exp_avg" not in live.state.get(live.param_groups[0]["params"][1], {})


def test_an_average_of_weights_starts_anew():
    content = load("3.2.1", "AdamW")
    content["optimizer"]["state"][0][0]["param_ema"] = torch.ones(4, 3)
    done = migrate(content["optimizer"], options={"use_ema": True})
    assert "state 'param_ema'" in {n.where for n in done.notes if n.kind == "dropped"}
    assert "param_ema" not in done.state_dict["state"][0]
    params = parameters(content)
    optimizer = hbcore.AdamW(params, **done.options)
    optimizer.load_state_dict(done.state_dict)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    with optimizer.ema_weights():
        assert float((params[0] - content["model"]["weight.0"]).norm()) < 0.1


def test_sams_inner_optimizer_is_converted():
    content = load("3.2.1", "AdamW")
    done = migrate({"wrapped": content["optimizer"], "ball": [0.1]})
    wrapper = hbcore.get("SAMWrapper")(parameters(content))
    wrapper.load_state_dict(done.state_dict)
    torch.testing.assert_close(wrapper.state_dict()["state"][0]["exp_avg"], done.state_dict["state"][0]["exp_avg"])


def test_a_heavyball_state_dict_is_no_torch_state_dict():
    for version in VERSIONS:
        content = load(version, "AdamW")
        optimizer = hbcore.AdamW(parameters(content))
        before = str(optimizer.state_dict())
        with pytest.raises(CheckpointError, match=r"HeavyBall's.*hbcore migrate IN OUT --to AdamW"):
            optimizer.load_state_dict(content["optimizer"])
        assert str(optimizer.state_dict()) == before
