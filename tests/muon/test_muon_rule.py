"""Muon's rule, by the plain driver: against a float64 oracle, against torch.optim.Muon, and its settings one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from core.kit import distance
from core.plain import plain
from reference.muon import JORDAN, muon
from rounding import factors

import hbcore
from hb_muon import Muon
from hb_muon.rules import MuonMomentum, Orthogonalize
from hbcore.api import Context, ScaleByAdam
from hbcore.rules import route
from hbcore.rules.division import eps_clamp

NUMBERS = ("lr", "betas", "eps", "momentum", "weight_decay", "warmup_steps")
SHAPES = {
    "square": (12, 12),
    "wide": (6, 20),
    "tall": (20, 6),
    "convolution": (12, 4, 3, 3),
    "experts": (3, 6, 5),
    "row": (1, 9),
    "vector": (13,),
    "scalar": (),
}
MATRICES = tuple(name for name, shape in SHAPES.items() if sum(n > 1 for n in shape) > 1)
JORDANS = {"ns_coefficients": "jordan"}

# (ours, the oracle's where the spelling differs)
CASES = {
    "defaults": ({}, {}),
    "jordan": (JORDANS, {"coefficients": JORDAN}),
    "numbers": ({"ns_coefficients": [3.0, -3.2, 1.2], "ns_steps": 3}, {"coefficients": [(3.0, -3.2, 1.2)], "ns_steps": 3}),
    "betas": ({"betas": (0.7, 0.95), "lr": 0.02}, {}),
    "momentum": ({"momentum": 0.95}, {}),
    "beta": ({"momentum": 0.2, "beta": 0.6}, {"momentum": 0.6}),
    "eps": ({"eps": 3.0}, {}),
    "no-nesterov": ({"nesterov": False}, {}),
    "heavyball": ({"heavyball_momentum": True}, {}),
    "heavyball-no-nesterov": ({"heavyball_momentum": True, "nesterov": False}, {}),
    "decay-and-warmup": ({"weight_decay": 0.3, "warmup_steps": 4, "lr": 0.05}, {}),
    "unscaled": ({"scale_mode": "none"}, {"scaling": "none"}),
    "graft": ({"scale_mode": "graft"}, {"scaling": "graft"}),
    "graft-heavyball": ({"scale_mode": "graft", "heavyball_momentum": True}, {"scaling": "graft"}),
    "original": ({"scale_mode": "none", "adjust_lr_fn": "original"}, {"scaling": "scale"}),
    "match_rms_adamw": ({"adjust_lr_fn": "match_rms_adamw"}, {"scaling": "match_rms_adamw"}),
    "exact": ({"method": "exact"}, {}),
    "gram": ({"method": "gram_newton_schulz", **JORDANS}, {"method": "newton_schulz", "coefficients": JORDAN}),
    "batch": ({"flatten": False}, {}),
    "ns_dtype": ({"ns_dtype": "bfloat16"}, {}),  # float64 stays float64
}
SPELLED_OTHERWISE = {"beta", "ns_coefficients", "scale_mode", "adjust_lr_fn", "ns_dtype"}


def start(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gradients(shape, steps=8, dtype=torch.float64):
    """Random gradients of sizes that vary, the fifth of them zero."""
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(g * 2.0 ** (k % 5 - 2) * (k != 4)).to(dtype) for k, g in enumerate(drawn)]


def trained(param, grads, **options):
    """What the plain driver makes of ``param``, with the group that the constructor made; structure stays as it is."""
    group = Muon([torch.nn.Parameter(param.clone())], **options).param_groups[0]
    structure = {k: v for k, v in group.items() if k not in (*NUMBERS, "params")}
    numbers = {k: group[k] for k in NUMBERS}
    return plain(lambda h: Muon.chain(SimpleNamespace(**{**structure, **vars(h)})), numbers, param, grads)


def expected(param, grads, options, spelled):
    settings = {k: v for k, v in options.items() if k not in SPELLED_OTHERWISE} | spelled
    return torch.tensor(muon(param.numpy(), [g.numpy() for g in grads], **settings))


def context():
    unused = torch.zeros(())
    return Context(unused, unused, torch.ones(()), eps_clamp, torch.sum, torch.amax, unused)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("options", "spelled"), CASES.values(), ids=CASES)
def test_a_setting_agrees_with_its_oracle(options, spelled, shape):
    param, grads = start(shape), gradients(shape)
    after, _ = trained(param, grads, **options)
    wanted = expected(param, grads, options, spelled)
    assert distance([after], [wanted]) < 1e-10
    assert distance([after - param], [wanted - param]) < 1e-9


@pytest.mark.parametrize(
    ("shape", "flatten", "split"),
    [
        ((12, 4), True, (4, 4, 4)),
        ((12, 5), True, (6, 3, 3)),
        ((9, 2, 3), True, (4, 5)),
        ((3, 8, 5), False, (2, 6)),
        ((2, 3, 6, 4), False, None),
    ],
    ids=str,
)
def test_parts_of_a_weight_agree_with_the_oracle(shape, flatten, split):
    param, grads = start(shape), gradients(shape)
    options = {"flatten": flatten, "split_sizes": split, "adjust_lr_fn": "match_rms_adamw"}
    after, _ = trained(param, grads, **options)
    assert distance([after], [expected(param, grads, options, {"scaling": "match_rms_adamw"})]) < 1e-10
    together, _ = trained(param, grads, adjust_lr_fn="match_rms_adamw")
    assert distance([after - param], [together - param]) > 0.1


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)], ids=str)
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
def test_torch_optim_muon_takes_the_same_steps(shape, adjust_lr_fn, nesterov):
    settings = {"lr": 0.05, "momentum": 0.95, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    param, grads = start(shape, torch.float32), gradients(shape, 20, torch.float32)
    theirs = torch.nn.Parameter(param.clone())
    reference = torch.optim.Muon([theirs], **settings)
    for g in grads:
        theirs.grad = g.clone()
        reference.step()
    ours, state = trained(param, grads, **settings, **JORDANS)
    assert distance([ours - param], [theirs.detach() - param]) < factors(torch.bfloat16)
    buffer = reference.state[theirs]["momentum_buffer"]
    assert distance([state["muon_momentum"]["momentum_buffer"]], [buffer]) < 1e-6


@pytest.mark.parametrize("shape", [SHAPES[name] for name in MATRICES], ids=MATRICES)
def test_both_forms_of_momentum_point_the_same_way(shape):
    param, grads = start(shape), gradients(shape)
    averaged, one = trained(param, grads, momentum=0.8)
    summed, other = trained(param, grads, momentum=0.8, heavyball_momentum=True)
    assert distance([summed], [averaged]) < 1e-10
    buffers = [s["muon_momentum"]["momentum_buffer"] for s in (one, other)]
    assert distance([buffers[0] * 5], [buffers[1]]) < 1e-12


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_who_is_orthogonalized_and_what_is_remembered(shape):
    param = start(shape)
    rule = Muon.chain(SimpleNamespace(**Muon([torch.nn.Parameter(param)]).param_groups[0]))
    taken = route.resolve(rule, route.branches(rule, param))
    if sum(n > 1 for n in shape) > 1:
        assert [type(t) for t in taken] == [MuonMomentum, Orthogonalize]
        assert {name for t in taken for name in t.slots(param)} == {"momentum_buffer"}
    else:
        assert [type(t) for t in taken] == [ScaleByAdam]


@pytest.mark.parametrize(
    ("shape", "settings", "blocks"),
    [
        ((6, 4), {}, [(0, 1, (6, 4))]),
        ((6, 4, 3, 3), {}, [(0, 1, (6, 36))]),
        ((6, 4, 3, 3), {"flatten": False}, [(0, 24, (3, 3))]),
        ((5, 6, 4), {"flatten": False}, [(0, 5, (6, 4))]),
        ((6, 4), {"flatten": False}, [(0, 1, (6, 4))]),
        ((6, 4), {"split": (2, 2, 2)}, [(0, 3, (2, 4))]),
        ((6, 4), {"split": (4, 1, 1)}, [(0, 1, (4, 4)), (16, 2, (1, 4))]),
        ((6, 2, 3), {"split": (4, 2)}, [(0, 1, (4, 6)), (24, 1, (2, 6))]),
    ],
    ids=str,
)
def test_how_a_weight_is_cut(shape, settings, blocks):
    assert [(b.start, b.batch, b.shape) for b in Orthogonalize(**settings).blocks(torch.Size(shape))] == blocks


@pytest.mark.parametrize("depth", [1, 4, 6, 9])
@pytest.mark.parametrize("settings", [{}, {"scale_mode": "graft"}, {"method": "gram_newton_schulz"}], ids=str)
def test_a_stack_equals_its_matrices_one_by_one(settings, depth):
    rule = Orthogonalize(**settings)
    u = torch.stack([start((6, 4)) * 2.0**i + i for i in range(depth)])
    before = u.clone()
    together, new = rule.update(u, {}, context())
    apart = torch.cat([rule.update(row[None], {}, context())[0] for row in u])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-11)
    assert torch.equal(u, before)
    assert new == {}


@pytest.mark.parametrize("together", [1, 100, 2**29])
@pytest.mark.parametrize("settings", [{}, {"scale_mode": "graft"}, {"method": "minimax"}, {"method": "exact"}], ids=str)
def test_stacks_that_run_together_equal_each_by_itself(monkeypatch, settings, together):
    monkeypatch.setattr("hb_muon.rules.TOGETHER", together)
    rule, shapes = Orthogonalize(**settings), [(2, 6, 4), (1, 4, 9), (3, 5, 5), (1, 9, 4)]
    stacks = [torch.stack([start(shape[1:]) * 2.0**i + i for i in range(shape[0])]) for shape in shapes]
    results = list(rule.update_stacks([(u, {}, context()) for u in stacks]))
    assert len(results) == len(stacks)
    for u, (factor, new) in zip(stacks, results, strict=True):
        torch.testing.assert_close(factor, rule.update(u, {}, context())[0], rtol=0, atol=1e-12)
        assert new == {}


def test_scales():
    u = torch.stack([start((20, 5)), 7 * start((20, 5))])

    def sizes(**settings):
        out, _ = Orthogonalize(method="exact", **settings).update(u, {}, context())
        return torch.linalg.matrix_norm(out)

    full = torch.full((2,), 5**0.5, dtype=torch.float64)  # five singular values of 1
    torch.testing.assert_close(sizes(scale_mode="none"), full)
    torch.testing.assert_close(sizes(), full * 2)  # sqrt(20 / 5)
    torch.testing.assert_close(sizes(adjust_lr_fn="original"), full * 2)
    torch.testing.assert_close(sizes(adjust_lr_fn="match_rms_adamw") / u[0].numel() ** 0.5, torch.full_like(full, 0.2))
    torch.testing.assert_close(sizes(scale_mode="graft"), torch.linalg.matrix_norm(u))


@pytest.mark.parametrize("scale_mode", ["none", "scale", "graft"])
@pytest.mark.parametrize("method", ["newton_schulz", "gram_newton_schulz", "exact"])
def test_all_zero_gradients_move_nothing(method, scale_mode):
    for shape in SHAPES.values():
        param = start(shape, torch.float32)
        after, _ = trained(param, [torch.zeros_like(param)] * 3, method=method, scale_mode=scale_mode)
        assert torch.equal(after, param)


@pytest.mark.parametrize(
    ("settings", "stack", "iteration"),
    [
        ({}, torch.bfloat16, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32, torch.float32),
        ({"method": "gram_newton_schulz"}, torch.bfloat16, torch.float16),  # no float16 before it is normalised
        ({"method": "minimax"}, torch.bfloat16, torch.float16),
        ({"method": "gram_newton_schulz", "dtype": torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ({"method": "exact"}, torch.float32, torch.float32),
    ],
    ids=str,
)
def test_working_dtypes(settings, stack, iteration):
    rule = Orthogonalize(**settings)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert rule.working_dtype(torch.zeros(2, 2, dtype=dtype)) == stack
    assert rule.iterate_in(torch.float32, torch.device("cpu")) == iteration
    assert rule.working_dtype(torch.zeros(2, 2, dtype=torch.float64)) == torch.float64
    for dtype in (stack, torch.float32, torch.float64):
        u = start((1, 6, 4), dtype)
        assert rule.update(u, {}, context())[0].dtype == (torch.float64 if dtype == torch.float64 else iteration)


def test_a_stack_in_the_working_dtype_gives_nearly_the_same_step():
    u = start((2, 16, 40), torch.float32)
    for settings in ({}, {"scale_mode": "graft"}, {"method": "gram_newton_schulz", "ns_coefficients": "you"}):
        rule = Orthogonalize(**settings)
        wanted, _ = rule.update(u.double(), {}, context())
        for dtype in (torch.float32, rule.working_dtype(u)):
            assert distance([rule.update(u.to(dtype), {}, context())[0]], [wanted]) < 0.03


def test_momentum_follows_betas_unless_it_is_given():
    param = [torch.nn.Parameter(start((3, 4)))]

    def momentum_of(group, **changed):
        return Muon.chain(SimpleNamespace(**{**group, **changed}))[0].then[0].momentum

    follows = Muon(param).param_groups[0]
    assert momentum_of(follows) == 0.9
    assert momentum_of(follows, betas=(0.5, 0.9)) == 0.5
    for given in ({"momentum": 0.3}, {"beta": 0.3}, {"momentum": 0.2, "beta": 0.3}):
        group = Muon(param, **given).param_groups[0]
        assert group["momentum"] == 0.3
        assert momentum_of(group, betas=(0.5, 0.9)) == 0.3


def test_groups_hold_plain_data():
    param = [torch.nn.Parameter(start((6, 4)))]
    lists = {"ns_coefficients": [[3, -3, 1], [2, -1, 0]], "split_sizes": [2, 4], "ns_dtype": torch.float32}
    group = Muon(param, **lists).param_groups[0]
    assert group["ns_coefficients"] == ((3.0, -3.0, 1.0), (2.0, -1.0, 0.0))
    assert group["split_sizes"] == (2, 4)
    assert group["ns_dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "svd"}, "method='svd' does not exist; pass one of 'auto', 'newton_schulz'"),
        ({"scale_mode": "big"}, "scale_mode='big' does not exist; pass one of 'none', 'scale', 'graft'"),
        ({"adjust_lr_fn": "adam"}, "adjust_lr_fn='adam' does not exist"),
        ({"adjust_lr_fn": "original", "scale_mode": "graft"}, "both set the scale"),
        ({"ns_coefficients": (1.0, 2.0)}, "must be three numbers"),
        ({"ns_steps": 0}, "ns_steps=0 must be a whole number from 1 to 99"),
        ({"ns_steps": 2.5}, "ns_steps=2.5"),
        ({"ns_dtype": "int8"}, "ns_dtype='int8' does not exist"),
        ({"momentum": 1.0}, r"momentum=1.0 is outside \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 is outside"),
    ],
    ids=str,
)
def test_settings_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([torch.nn.Parameter(start((3, 4)))], **options)


def test_rows_that_do_not_add_up():
    with pytest.raises(ValueError, match=r"split=\(2, 2\) does not add up to the 6 rows"):
        trained(start((6, 4)), gradients((6, 4), 1), split_sizes=(2, 2))


def test_names():
    assert hbcore.get("Muon") is Muon
    with pytest.warns(FutureWarning, match="Muon"):
        assert hbcore.get("ForeachMuon") is Muon
