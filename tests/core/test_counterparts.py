"""Trainings move between torch.optim and hbcore in the middle, whichever optimizer of the two has the same rule."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from rounding import drift
from torch import Tensor, nn

import hbcore
from hbcore.api import Counterpart, Optimizer
from hbcore.checkpoint.counterpart import counterpart_of
from hbcore.errors import CheckpointError, StateWarning

ADD = {"division_backend": "eps_add"}
TORCH_RMSPROP = {**ADD, "debias": False, "decoupled_weight_decay": False}
JORDAN = {"ns_coefficients": "jordan", "eps": 1e-7}


class Pair(NamedTuple):
    """The same optimizer twice: its name, what both are given, and what ours is given besides."""

    name: str
    shared: dict[str, Any]
    ours: dict[str, Any] = ADD
    bf16: bool = True
    bound: float | None = None


PAIRS = [
    Pair("Adam", {}),
    Pair("Adam", {"weight_decay": 0.1, "betas": (0.8, 0.97), "eps": 1e-4, "maximize": True}),
    Pair("Adam", {"amsgrad": True}),
    Pair("AdamW", {"weight_decay": 0.1}),
    Pair("AdamW", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    Pair("SGD", {"momentum": 0.0}, {"decoupled_weight_decay": False}),
    Pair("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, {"decoupled_weight_decay": False}),
    Pair("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}, {}),
    Pair("NAdam", {"weight_decay": 0.1}),
    Pair("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.02, "betas": (0.95, 0.99)}),
    Pair("RMSprop", {"weight_decay": 0.1}, TORCH_RMSPROP),
    Pair("RMSprop", {"momentum": 0.9, "alpha": 0.9, "maximize": True}, TORCH_RMSPROP),
    Pair("RMSprop", {"centered": True, "momentum": 0.5}, TORCH_RMSPROP),
    # in bfloat16, torch's row means and its eps are bfloat16's: docs/differences.md
    Pair("Adafactor", {"weight_decay": 0.1}, {}, bf16=False),
    Pair("Adafactor", {"d": 2.0, "beta2_decay": -0.5, "eps": (1e-8, 1e-2)}, {}, bf16=False),
    Pair("SparseAdam", {"betas": (0.8, 0.97)}, {}),
    # torch orthogonalizes in bfloat16 whatever the dtype, ours in float64 for float64: entries of a factor, of about 1/2 here,
    # are off by some 2^-8 in each of 30 steps of lr 0.01
    Pair("Muon", {"weight_decay": 0.1}, JORDAN, bound=3e-3),
    Pair("Muon", {"momentum": 0.8, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}, JORDAN, bound=3e-3),
]
IDS = ["-".join([pair.name, *pair.shared]) for pair in PAIRS]
every_pair = pytest.mark.parametrize("pair", PAIRS, ids=IDS)
both_ways = pytest.mark.parametrize("into_ours", [True, False], ids=["to hbcore", "to torch"])


@pytest.fixture
def default_float64():
    """torch keeps NAdam's product in the default dtype, in which alone it agrees to float64's precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Training:
    """Parameters in two groups, one frozen and one without gradients among them, under a schedule."""

    def __init__(self, pair: Pair, ours: bool, dtype: torch.dtype, like: Training | None = None, lr: float = 0.01) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = [(6, 4), (5, 5), (3, 8), (4, 4)] if pair.name in ("Muon", "SparseAdam") else [(6, 4), (2, 3, 4), (7,), (3,)]
        self.params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]
        self.params[1].requires_grad_(False)
        if like is not None:
            with torch.no_grad():
                for p, q in zip(self.params, like.params, strict=True):
                    p.copy_(q)
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": lr / 2}]
        make = hbcore.get(pair.name) if ours else getattr(torch.optim, pair.name)
        more = {**pair.ours, "compile": "eager"} if ours else {}
        self.sparse = pair.name == "SparseAdam"
        self.optimizer = make(groups, lr=lr, **pair.shared, **more)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.97)

    def run(self, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in (self.params[0], self.params[2]):
                p.grad = self.gradient(p, generator)
            self.optimizer.step()
            self.scheduler.step()

    def gradient(self, p: Tensor, generator: torch.Generator) -> Tensor:
        dense = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if not self.sparse:
            return dense
        rows = torch.randperm(p.shape[0], generator=generator)[:2]
        return torch.sparse_coo_tensor(rows[None], dense[rows], p.shape, check_invariants=True).coalesce()

    def receive(self, other: Training) -> None:
        """Take the state of ``other`` over, through its library's own interface or ours."""
        exports = isinstance(other.optimizer, Optimizer)
        saved = hbcore.export(other.optimizer) if exports else other.optimizer.state_dict()
        self.optimizer.load_state_dict(copy.deepcopy(saved))
        self.scheduler.load_state_dict(copy.deepcopy(other.scheduler.state_dict()))


def moved(pair: Pair, into_ours: bool, dtype: torch.dtype) -> tuple[Training, Training]:
    """A training after 20 steps, and one that took over after five of them in the other library."""
    before = Training(pair, not into_ours, dtype)
    before.run(range(5))
    after = Training(pair, into_ours, dtype, before, lr=5.0)  # whose own rate would be noticed
    with warnings.catch_warnings():
        warnings.simplefilter("error", StateWarning)
        if dtype == torch.bfloat16:
            warnings.filterwarnings("ignore", "state .* was saved as torch.bfloat16 and is converted", StateWarning)
        after.receive(before)
    for group, other in zip(before.optimizer.param_groups, after.optimizer.param_groups, strict=True):
        assert other["lr"] == group["lr"] and other["initial_lr"] == group["initial_lr"]
    for training in (before, after):
        training.run(range(5, 20))
    return before, after


def furthest(a: Training, b: Training) -> float:
    """The largest distance of two trainings' parameters, relative to the parameters."""
    pairs = zip(a.params, b.params, strict=True)
    return max(((p.double() - q.double()).norm() / q.double().norm()).item() for p, q in pairs)


@every_pair
@both_ways
@pytest.mark.usefixtures("default_float64")
def test_a_float64_training_goes_on_in_the_other_library(pair, into_ours):
    before, after = moved(pair, into_ours, torch.float64)
    assert furthest(after, before) < (pair.bound or 1e-12)


@every_pair
@both_ways
def test_a_float32_training_goes_on_in_the_other_library(pair, into_ours):
    before, after = moved(pair, into_ours, torch.float32)
    assert furthest(after, before) < (pair.bound or drift(torch.float32, 20))


@pytest.mark.parametrize("pair", [p for p in PAIRS if p.bf16], ids=[i for p, i in zip(PAIRS, IDS, strict=True) if p.bf16])
@both_ways
def test_a_bfloat16_training_goes_on_in_the_other_library(pair, into_ours):
    before, after = moved(pair, into_ours, torch.bfloat16)
    # torch computes in bfloat16 and we in float32: each of 20 steps rounds a parameter by 2^-9 of it, in both
    assert furthest(after, before) < 20 * 2**-9


@every_pair
@both_ways
def test_state_and_groups_have_the_entries_of_the_library_that_they_went_to(pair, into_ours):
    _, after = moved(pair, into_ours, torch.float32)
    native = Training(pair, into_ours, torch.float32)
    native.run(range(20))
    ours, theirs = after.optimizer.state_dict(), native.optimizer.state_dict()
    for group, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert set(group) == set(other)
    for key, entry in theirs["state"].items():
        spare = {"step"} if "step" not in entry else set()  # torch's SGD and Muon count none, and keep ours
        spare |= {"momentum_buffer"} if not pair.shared.get("momentum") else set()  # ours keeps one for a schedule
        assert set(entry) - spare <= set(ours["state"][key]) <= set(entry) | spare
        for name, value in entry.items():
            there = ours["state"][key].get(name)
            if there is not None and value is not None:
                assert type(there) is type(value), name
    trained = {0, 2} if not into_ours else {0, 2, 3}  # torch makes a parameter's state in its first step
    assert theirs["state"].keys() <= ours["state"].keys() <= trained


# --- what does not fit ------------------------------------------------------------------------------------------------


def torch_state(name: str, **options: Any) -> dict[str, Any]:
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = getattr(torch.optim, name)([p], **options)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    return optimizer.state_dict()


DIFFERS = {
    "Nesterov": ("SGD", {"momentum": 0.9, "nesterov": True}, {}, "nesterov=True"),
    "coupled decay": ("SGD", {"weight_decay": 0.1}, {}, "decoupled_weight_decay=False"),
    "Adam's decoupled decay": ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}, {}, "which is its rule"),
    "no debiasing": ("RMSprop", {}, {}, "debias=False"),
    "eps of another form": ("Adafactor", {"eps": (1e-9, 1e-3)}, {}, "eps="),
    "coefficients": ("Muon", {}, {}, r"ns_coefficients=\(\(3.4445"),
    "steps": ("Muon", {"ns_steps": 3}, JORDAN, "ns_steps=3"),
    "scale": ("Muon", {}, {**JORDAN, "scale_mode": "none"}, "adjust_lr_fn='original'"),
    "sums": ("Muon", {}, {**JORDAN, "heavyball_momentum": True}, "heavyball_momentum=False"),
    "another method": ("Muon", {}, {**JORDAN, "method": "exact"}, "method='newton_schulz'"),
    "differentiable": ("Adam", {"differentiable": True}, {}, "differentiable=True"),
}


@pytest.mark.parametrize("case", DIFFERS)
def test_a_setting_that_makes_the_rules_differ_is_named(case):
    name, options, ours, message = DIFFERS[case]
    if case == "differentiable":
        saved = torch_state(name)
        saved["param_groups"][0]["differentiable"] = True
    else:
        saved = torch_state(name, **options)
    optimizer = hbcore.get(name)([nn.Parameter(torch.ones(4, 4))], compile="eager", **ours)
    with pytest.warns(StateWarning, match=message):
        optimizer.load_state_dict(saved)


STATE = {
    "AMSGrad": ("Adam", {"amsgrad": True}, "amsgrad=True", "'max_exp_avg_sq'"),
    "centered": ("RMSprop", {"centered": True}, "centered=True", "'grad_avg'"),
}


@pytest.mark.filterwarnings("ignore:RMSprop. param group 0 .* debias:hbcore.StateWarning")
@pytest.mark.parametrize("case", STATE)
def test_state_without_a_counterpart_is_an_error_that_names_it(case):
    name, options, setting, slot = STATE[case]
    optimizer = hbcore.get(name)([nn.Parameter(torch.ones(4, 4))], compile="eager")
    with pytest.warns(StateWarning, match=setting), pytest.raises(CheckpointError, match=slot):
        optimizer.load_state_dict(torch_state(name, **options))
    assert not optimizer.state


LOST = {
    "decoupled decay": ("SGD", {"weight_decay": 0.1}, "decoupled_weight_decay=True"),
    "debiasing": ("RMSprop", {}, "debias=True"),
    "options": ("AdamW", {"caution": True, "mars": True}, "caution"),
    "warm-up": ("AdamW", {"warmup_steps": 5}, "warmup_steps=5"),
    "coefficients": ("Muon", {}, "ns_coefficients=None"),
    "a scale": ("Muon", {**JORDAN, "scale_mode": "graft"}, "adjust_lr_fn=None"),
    "palm": ("AdamW", {"palm": True}, "palm"),
}


@pytest.mark.parametrize("case", LOST)
def test_export_names_what_torch_goes_on_without(case):
    name, options, message = LOST[case]
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = hbcore.get(name)([p], compile="eager", **options)
    p.grad = torch.ones(4, 4)
    optimizer.step()
    with pytest.warns(StateWarning, match=message):
        hbcore.export(optimizer)


def test_a_product_of_momenta_that_a_schedule_changed_is_named():
    saved = torch_state("NAdam")
    saved["state"][0]["mu_product"] *= 1.5
    with pytest.warns(StateWarning, match="mu_product"):
        hbcore.get("NAdam")([nn.Parameter(torch.ones(4, 4))]).load_state_dict(saved)


HOSTILE = {
    "coefficients": ("Muon", {"ns_coefficients": "none such"}, {}),
    "no number": ("Muon", {"momentum": "high"}, {}),
    "betas": ("NAdam", {"betas": None}, {}),
    "a NaN": ("NAdam", {"betas": (float("nan"), 0.9)}, {}),
    "a step": ("NAdam", {}, {"step": torch.ones(3)}),
    "a matrix of products": ("NAdam", {}, {"mu_product": torch.ones(3), "exp_avg": "gone"}),
    "a slot": ("RMSprop", {}, {"square_avg": torch.ones(5)}),
}


@pytest.mark.filterwarnings("ignore::hbcore.StateWarning")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_malformed_checkpoint_is_refused_and_changes_nothing(case):
    name, entries, slots = HOSTILE[case]
    saved = torch_state(name)
    saved["param_groups"][0].update(entries)
    saved["state"][0].update(slots)
    optimizer = hbcore.get(name)([nn.Parameter(torch.ones(4, 4))], compile="eager")
    before = copy.deepcopy(optimizer.param_groups[0]["lr"]), len(optimizer.state)
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["lr"], len(optimizer.state)) == before


@pytest.mark.filterwarnings("ignore:ForeachAdamW is another name:FutureWarning")
def test_third_parties_declare_counterparts_and_other_rules_have_none():
    adam = hbcore.get("Adam")

    class Renamed(adam):
        counterpart = Counterpart("Adam", reads=lambda theirs, ours: {**theirs, "lr": 2 * theirs["lr"]})

    class Another(adam):
        @staticmethod
        def chain(h):
            return adam.chain(h)

    optimizer = Renamed([nn.Parameter(torch.ones(4, 4))])
    optimizer.load_state_dict(torch_state("Adam", lr=0.25))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert counterpart_of(Another) is None
    assert counterpart_of(hbcore.get("ForeachAdamW")) is counterpart_of(hbcore.get("AdamW"))
