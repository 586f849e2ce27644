"""``skip_nonfinite=True``: a step with an inf or a NaN in any gradient leaves no trace; the run is the one without it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from core.kit import gradients, one_of_each, parameters
from torch import nn

import hbcore
from hbcore.api import Optimizer, Transform
from hbcore.errors import OptionError, RuleError
from hbcore.wrappers.gradient_release import hook_into_backward

SHAPES = ((6, 5), (5,), (4, 4))
BAD = {1: math.nan, 3: math.inf, 4: -math.inf, 7: math.nan}
"""Attempt -> what one gradient holds then. Two in a row; the first attempt has one where a test says so."""

NAMES = [n for n in hbcore.list_optimizers() if n not in ("SAMWrapper", "SparseAdam")]


def attempts(bad, good=6):
    """Gradients of ``good`` steps, and between them those of ``bad`` attempts, in which one element is not finite."""
    usual, t = list(gradients(good, SHAPES)), 0
    while usual:
        if t in bad:
            grads = [torch.full(s, 0.5) for s in SHAPES]
            grads[t % 3].view(-1)[3] = bad[t]
            yield grads
        else:
            yield usual.pop(0)
        t += 1


def trained(name, bad, **options):
    params = parameters(SHAPES)
    optimizer = hbcore.get(name)(list(zip("abc", params, strict=True)), lr=0.01, skip_nonfinite=True, **options)
    for grads in attempts(bad):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(p.dtype, copy=True)
        optimizer.step()
    return params, optimizer


def assert_same_run(name, bad, **options):
    """Both the parameters and everything that a checkpoint holds are equal bit for bit."""
    expected, reference = trained(name, {}, **options)
    params, optimizer = trained(name, bad, **options)
    assert optimizer.report.skipped == len(bad)
    assert all(map(torch.equal, params, expected))
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    if not options.get("capturable"):  # the host does not know then how many steps a group took
        assert ours["param_groups"] == theirs["param_groups"]
    for i, entry in theirs["state"].items():
        assert ours["state"][i].keys() == entry.keys()
        assert all(torch.equal(ours["state"][i][k], t) for k, t in entry.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", one_of_each(NAMES))
def test_a_run_is_the_same_without_the_bad_steps(name):
    assert_same_run(name, BAD, compile="eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "Muon", "SOAP", "PSGDKron", "MSAMLaProp"])
def test_the_very_first_step_may_be_bad(name):
    """State is created, rules that only prime at first do so one step later, and counts stay at 0."""
    assert_same_run(name, {0: math.nan, 1: math.inf}, compile="eager")


@pytest.mark.parametrize("backend", ["triton", "cpp", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", ["AdamW", pytest.param("Muon", marks=pytest.mark.broad)])
def test_on_other_backends(name, backend):
    assert_same_run(name, BAD, compile=backend)


@pytest.mark.parametrize(
    "options",
    [
        {"ecc": "bf16+8", "stochastic_rounding": True},
        {"param_ecc": "bf16+8"},
        {"gradient_clipping": "global_l2norm_clip", "caution": True},
        {"mars": True, "use_ema": True, "warmup_steps": 4},
        {"multi_tensor": False},
        {"capturable": True},
    ],
    ids=lambda o: "-".join(o),
)
def test_with_other_options(options):
    assert_same_run("AdamW", BAD, compile="eager", **options)


def test_a_matrix_rule_with_packed_state():
    assert_same_run("SOAP", BAD, compile="eager", ecc="bf16+8", stochastic_rounding=True, precondition_frequency=3)


def test_parts_of_a_composed_optimizer_skip_together():
    runs = []
    for bad in ({}, {1: "0.weight", 2: "3.bias"}):  # a matrix of Muon's, a vector of SFAdamW's
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))
        specs = [{"optimizer": "Muon", "when": lambda p: p.ndim > 1}, {"optimizer": "SFAdamW"}]
        optimizer = hbcore.SplitOpt(model.named_parameters(), specs, lr=0.01, skip_nonfinite=True)
        for t in range(3 + len(bad)):
            seed = t - sum(k < t for k in bad) if t not in bad else 99
            for i, (name, p) in enumerate(model.named_parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i))
                if bad.get(t) == name:
                    p.grad.view(-1)[0] = math.nan
            optimizer.step()
        assert optimizer.report.skipped == len(bad)
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *runs))


def test_a_part_that_steps_by_itself_looks_at_its_own_gradients():
    model = nn.Linear(4, 3)
    specs = [{"optimizer": "Muon", "when": lambda p: p.ndim > 1}, {"optimizer": "AdamW"}]
    optimizer = hbcore.SplitOpt(model.named_parameters(), specs, lr=0.1, skip_nonfinite=True)
    model.weight.grad, model.bias.grad = torch.ones(3, 4), torch.full((3,), math.nan)
    optimizer.step()
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones(3, 4)
    optimizer.children[0].step()
    assert optimizer.children[0].report.skipped == 1
    assert not torch.equal(model.weight, before)


def test_sharpness_aware_steps_skip():
    [p] = params = parameters([(5,)])
    before = p.detach().clone()
    optimizer = hbcore.get("SAMWrapper")(params, wrapped_optimizer="AdamW", lr=0.1, skip_nonfinite=True)

    def closure():
        optimizer.zero_grad()
        (p * math.nan).sum().backward()

    optimizer.step(closure)
    assert torch.equal(p, before)
    assert optimizer.report.skipped == 1


def test_sparse_gradients_skip():
    [table] = params = parameters([(6, 3)])
    before = table.detach().clone()
    optimizer = hbcore.get("SparseAdam")(params, lr=0.1, skip_nonfinite=True)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1, 4]]), torch.tensor([[1.0, math.inf, 0.0]] * 2), (6, 3))
    optimizer.step()
    assert torch.equal(table, before)
    assert optimizer.state[table]["step"] == 0
    assert optimizer.report.skipped == 1


def test_without_the_option_nothing_is_skipped():
    params = parameters(SHAPES)
    optimizer = hbcore.get("AdamW")(params, lr=0.01, compile="eager")
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert all(p.isnan().all() for p in params)
    assert optimizer.report.skipped == 0


def test_the_report_says_so():
    _, optimizer = trained("AdamW", BAD, compile="eager")
    assert "4 steps skipped: a gradient was not finite" in str(optimizer.report)


def test_gradient_release_refuses_it():
    model = nn.Linear(3, 2)
    optimizer = hbcore.get("AdamW")(model.parameters(), skip_nonfinite=True)
    with pytest.raises(OptionError, match=r"skip_nonfinite=True needs all gradients"):
        hook_into_backward(model, optimizer)


@dataclass(frozen=True)
class Sorted(Transform):
    """A rule that cannot be fused."""

    name = "sorted"

    def update(self, u, s, c):
        return u.reshape(-1).sort().values.view(u.shape), {}


class SortedStep(Optimizer):
    lr: float = 0.1

    @staticmethod
    def chain(h):
        return (Sorted(),)


def test_a_rule_that_cannot_be_fused_is_refused():
    params = parameters(SHAPES)
    optimizer = SortedStep(params, skip_nonfinite=True, compile="eager")
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(RuleError, match="skip_nonfinite=True needs rules that can be fused"):
        optimizer.step()
