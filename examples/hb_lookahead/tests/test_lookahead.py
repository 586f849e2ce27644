"""Lookahead against a float64 oracle written from the paper, on every backend, on shards, compressed and resumed."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import jobs
from distributed.ranks import on_ranks

import hbcore
from hb_lookahead import Lookahead, SlowWeights
from hb_lookahead.plugin import OPTIMIZERS
from hbcore.errors import HyperparameterError, OptionError, RuleError
from hbcore.registry import Registry
from hbcore.testing import CHECKS, Check, Subject

Array = np.ndarray
Inner = Callable[[Array, Array], Array]
"""An optimizer that remembers what it needs: parameter, gradient -> the parameter after its step."""

SHAPES = ((5, 7), (13,), ())


def lookahead(phi: Array, grads: list[Array], inner: Inner, k: int, alpha: float) -> Array:
    """Algorithm 1 of arXiv:1907.08610: an outer loop over the slow weights, an inner one of ``k`` steps; the fast weights."""
    theta = phi
    for i, grad in enumerate(grads, 1):
        theta = inner(theta, grad)
        if i % k == 0:
            theta = phi = phi + alpha * (theta - phi)
    return theta


def sgd(lr: float, momentum: float) -> Inner:
    buffer: list[Array] = []

    def step(theta: Array, grad: Array) -> Array:
        buffer[:] = [momentum * buffer[0] + grad if buffer else grad]
        return theta - lr * buffer[0]

    return step


def adamw(lr: float, b1: float, b2: float, decay: float) -> Inner:
    m = v = np.float64(0)
    counter = itertools.count(1)

    def step(theta: Array, grad: Array) -> Array:
        nonlocal m, v
        t = next(counter)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        direction = m / (1 - b1**t) / np.maximum(np.sqrt(v / (1 - b2**t)), 1e-8)
        return theta - lr * (direction + decay * theta)

    return step


CASES = {
    "sgd": ({"base": "SGD", "lr": 0.1, "momentum": 0.9}, lambda: sgd(0.1, 0.9)),
    "adamw": ({"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}, lambda: adamw(0.1, 0.9, 0.95, 0.1)),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradient(step: int, i: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + i)
    return torch.randn(SHAPES[i], generator=generator, dtype=torch.float64).to(dtype)


def train(optimizer: Any, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = gradient(step, i, p.dtype)
        optimizer.step()


def distance(ours: Any, theirs: Any) -> float:
    """The largest, over the tensors, of the norm of the difference relative to the norm."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        b = torch.as_tensor(b).double()
        worst = max(worst, float((a.detach().double() - b).norm() / b.norm()))
    return worst


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (1, 0.8), (3, 0.0), (4, 1.0), (7, 0.3)])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_papers(case: str, k: int, alpha: float, dtype: torch.dtype) -> None:
    """After every step, those between two returns included."""
    options, inner = CASES[case]
    params = parameters(dtype)
    starts = [p.detach().double().numpy().copy() for p in params]
    optimizer = Lookahead(params, k=k, alpha=alpha, **options)
    for t in range(11):
        train(optimizer, params, range(t, t + 1))
        grads = [[gradient(s, i, dtype).double().numpy() for s in range(t + 1)] for i in range(len(params))]
        expected = [lookahead(start, its, inner(), k, alpha) for start, its in zip(starts, grads, strict=True)]
        assert distance(params, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["inductor", "triton"])
@pytest.mark.parametrize("base", ["AdamW", "SFAdamW", "Muon"])
@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8", "weight_decay": 0.1}], ids=["plain", "ecc"])
def test_backends_agree(base: str, backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor" and (base, options) != ("AdamW", {}):  # the graphs as they are; compiling takes seconds
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    results = []
    for compile in ("eager", backend):
        params = parameters()
        optimizer = Lookahead(params, base=base, lr=0.05, k=2, compile=compile, **options)
        train(optimizer, params, range(5))
        results.append(params)
    assert backend in optimizer.report.backend and not optimizer.report.reasons
    assert distance(results[1], [p.detach() for p in results[0]]) < 1e-5


RANKS = {"AdamW": {}, "SOAP": {"precondition_frequency": 2, "max_precond_dim": 20}, "SFAdamW": {"ecc": "bf16+8"}}


@pytest.mark.parametrize("base", RANKS)
def test_two_ranks_follow_one_and_resume_exactly(base: str) -> None:
    cls, options = Lookahead.over(base), {"k": 2, **RANKS[base]}
    alone = jobs.follow(0, cls, options, "alone")
    for result in on_ranks(2, jobs.follow, cls, options, "fsdp"):
        assert distance(result.values(), alone.values()) < 1e-6
    for straight, resumed, _ in on_ranks(2, jobs.resume, cls, options):
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("base", ["AdamW", "PSGDKron", "MSAMLaProp"])
@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}], ids=["plain", "ecc"])
@pytest.mark.parametrize("at", [0, 3, 5, 7])
def test_it_resumes_bit_for_bit(base: str, options: dict[str, Any], at: int) -> None:
    """Before the first step, between two returns, and right after one."""
    straight, params = parameters(), parameters()
    train(Lookahead(straight, base=base, **options), straight, range(12))
    optimizer = Lookahead(params, base=base, **options)
    train(optimizer, params, range(at))
    resumed = Lookahead(params, base=base, lr=9.0, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, params, range(at, 12))
    assert all(map(torch.equal, params, straight))


def test_slow_weights_keep_their_precision_whatever_stores_the_state() -> None:
    params = parameters()
    optimizer = Lookahead(params, k=100, storage_dtype="bfloat16")
    before = [p.detach().clone() for p in params]
    train(optimizer, params, range(2))
    assert all(map(torch.equal, (optimizer.state[p]["slow"] for p in params), before))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16


def test_small_steps_of_bfloat16_parameters_are_never_undone() -> None:
    """A step that rounding swallows is no distance from the slow weights: nothing may move, least of all backwards."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Lookahead([p], base="SGD", lr=1e-4, k=3)
    for _ in range(30):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


def test_turned_on_late_it_starts_where_the_parameters_are() -> None:
    params = parameters()
    optimizer = hbcore.get("AdamW")(params, lr=0.1)
    train(optimizer, params, range(4))
    late = Lookahead(params, lr=0.1, k=3, alpha=0.0)
    late.load_state_dict(optimizer.state_dict())
    here = [p.detach().clone() for p in params]
    train(late, params, range(4, 6))  # the sixth step returns
    assert all(map(torch.equal, params, here))


def test_it_shows_takes_and_carries_the_bases_hyperparameters() -> None:
    signature = inspect.signature(Lookahead.over("SGD")).parameters
    assert {"lr", "momentum", "nesterov", "k", "alpha", "weight_decay"} <= {*signature} and signature["k"].default == 5
    optimizer = Lookahead(parameters(), base="SGD", momentum=0.5, k=7)
    again = pickle.loads(pickle.dumps(type(optimizer)))(optimizer.param_groups)
    assert type(again) is type(optimizer) and again.param_groups[0]["momentum"] == 0.5 and again.param_groups[0]["k"] == 7


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k": 0}, HyperparameterError, "k=0 is not a whole number"),
        ({"k": 2.5}, HyperparameterError, r"k=2\.5 is not a whole number"),
        ({"alpha": 1.5}, HyperparameterError, "alpha"),
        ({"base": "RMSprop"}, RuleError, "'alpha'"),
        ({"base": "SparseAdam"}, OptionError, "dense gradients"),
        ({"base": "SAMWrapper"}, OptionError, "made of rules"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Lookahead(parameters(), **options)


def checks() -> list[Any]:
    subjects = [Subject(Lookahead, OPTIMIZERS[0].capabilities, options) for options in ({}, {"ecc": "bf16+8"})]
    subjects += [Subject(Lookahead.over(base), hbcore.info(base).spec.capabilities) for base in ("SFAdamW", "SOAP")]
    found = [
        (c, s, () if s is subjects[0] else pytest.mark.broad) for s in subjects for c in CHECKS if c.applies(s.capabilities)
    ]
    return [pytest.param(c, s, id=f"{s}-{c.name}", marks=marks) for c, s, marks in found]


@pytest.mark.parametrize(("check", "subject"), checks())
def test_it_conforms(check: Check, subject: Subject) -> None:
    check.run(subject)


def test_the_entry_point_offers_it() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."hbcore.plugins"]\nhb_lookahead = "hb_lookahead.plugin"' in project
    registry = Registry(lambda: [EntryPoint("hb_lookahead", "hb_lookahead.plugin", "hbcore.plugins")])
    assert registry.get("lookahead") is Lookahead
    assert SlowWeights.stage == "after"
