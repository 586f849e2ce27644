"""Prodigy against a float64 oracle written from the paper, on every backend, on shards, compressed and resumed."""

from __future__ import annotations

import copy
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import jobs
from distributed.ranks import on_ranks

from hb_prodigy import Prodigy
from hb_prodigy.plugin import OPTIMIZERS
from hbcore.errors import HyperparameterError
from hbcore.registry import Registry
from hbcore.testing import CHECKS, Check, Subject

SHAPES = ((5, 7), (13,), ())
STEPS = 12


def prodigy(
    starts: list[np.ndarray], grads: list[list[np.ndarray]], lr: list[float],
    b1: float, b2: float, eps: float, d0: float, decay: float,
) -> tuple[list[np.ndarray], float]:  # fmt: skip
    """Algorithm 4 of arXiv:2306.06101, factors included, with decoupled decay; the parameters and the last estimate."""
    x, b3, d, r = [s.copy() for s in starts], b2**0.5, d0, 0.0
    m, v, s = ([np.zeros_like(p) for p in x] for _ in range(3))
    for rate, g in zip(lr, grads, strict=True):
        products = sum(float((gi * (x0 - xi)).sum()) for gi, x0, xi in zip(g, starts, x, strict=True))
        r = b3 * r + (1 - b3) * rate * d**2 * products
        for i, gi in enumerate(g):
            m[i] = b1 * m[i] + (1 - b1) * d * gi
            v[i] = b2 * v[i] + (1 - b2) * d**2 * gi**2
            s[i] = b3 * s[i] + (1 - b3) * rate * d**2 * gi
            x[i] = x[i] - rate * d * (m[i] / np.maximum(np.sqrt(v[i]), d * eps) + decay * x[i])
        d = max(d, r / sum(float(np.abs(si).sum()) for si in s))
    return x, d


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradient(step: int, i: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Mostly one direction, so that the estimate grows."""
    steady = torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    noise = torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(100 * step + i), dtype=torch.float64)
    return (steady + 0.3 * noise).to(dtype)


def train(optimizer: Any, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = gradient(step, i, p.dtype)
        optimizer.step()


def distance(ours: Any, theirs: Any) -> float:
    pairs = ((a.detach().double(), torch.as_tensor(b).double()) for a, b in zip(ours, theirs, strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decayed": {"weight_decay": 0.1, "betas": (0.8, 0.99), "lr": 0.7},
    "warmed-up": {"warmup_steps": 4},
}
FIRST = {torch.float64: 1e-6, torch.float32: 1e-2}
"""The first estimate. Parameters about 1 that move by 1e-6 lose most of the way in float32, and the estimate with it."""


def expected(options: dict[str, Any], dtype: torch.dtype) -> tuple[list[np.ndarray], float]:
    starts = [p.detach().double().numpy().copy() for p in parameters(dtype)]
    grads = [[gradient(t, i, dtype).double().numpy() for i in range(len(SHAPES))] for t in range(STEPS)]
    rates = [options.get("lr", 1.0) * min(1, (t + 1) / (options.get("warmup_steps", 0) + 1)) for t in range(STEPS)]
    b1, b2 = options.get("betas", (0.9, 0.999))
    return prodigy(starts, grads, rates, b1, b2, 1e-8, options.get("d0", 1e-6), options.get("weight_decay", 0.0))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_papers(name: str, dtype: torch.dtype, bound: float) -> None:
    params = parameters(dtype)
    options = {"d0": FIRST[dtype], **OPTIONS[name]}
    optimizer = Prodigy(params, **options)
    train(optimizer, params, range(STEPS))
    x, d = expected(options, dtype)
    assert d > 2 * FIRST[dtype]  # the estimate took part
    assert distance(params, x) < bound
    for p in params:
        assert float(optimizer.state[p]["d"]) == pytest.approx(d, rel=100 * bound)  # made of differences of near parameters


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8", "weight_decay": 0.1}], ids=["plain", "ecc"])
@pytest.mark.parametrize("backend", ["inductor", "triton"])
def test_backends_agree(backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor":  # the graphs as they are; compiling takes seconds
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    results = []
    for compile in ("eager", backend):
        params = parameters()
        optimizer = Prodigy(params, compile=compile, **options)
        train(optimizer, params, range(STEPS))
        results.append(params)
    assert optimizer.report.backend == backend and not optimizer.report.reasons
    assert distance(results[1], [p.detach() for p in results[0]]) < 1e-5


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}], ids=["plain", "ecc"])
def test_two_ranks_follow_one_and_resume_exactly(options: dict[str, Any]) -> None:
    alone = jobs.follow(0, Prodigy, {"d0": 0.01, **options}, "alone")
    for result in on_ranks(2, jobs.follow, Prodigy, {"d0": 0.01, **options}, "fsdp"):
        assert distance(result.values(), alone.values()) < 1e-5
    for straight, resumed, _ in on_ranks(2, jobs.resume, Prodigy, {"d0": 0.01, **options}):
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}, {"skip_nonfinite": True}], ids=["plain", "ecc", "skip"])
@pytest.mark.parametrize("at", [0, 1, 6])
def test_it_resumes_bit_for_bit(options: dict[str, Any], at: int) -> None:
    straight, params = parameters(), parameters()
    train(Prodigy(straight, **options), straight, range(STEPS))
    optimizer = Prodigy(params, **options)
    train(optimizer, params, range(at))
    resumed = Prodigy(params, lr=9.0, d0=0.5, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, params, range(at, STEPS))
    assert all(map(torch.equal, params, straight))


def test_it_needs_sixteen_bytes_per_parameter_and_no_learning_rate() -> None:
    """A quadratic whose curvature and distance it knows nothing of."""
    p = torch.nn.Parameter(torch.full((64,), 30.0))
    optimizer = Prodigy([p])
    for _ in range(500):
        p.grad = 0.01 * (p.detach() - 10.0)
        optimizer.step()
    assert float((p.detach() - 10.0).abs().max()) < 1.0
    full = [t for t in optimizer.state[p].values() if t.ndim]
    assert sum(t.numel() * t.element_size() for t in full) == 16 * p.numel()


def test_zero_gradients_leave_the_estimate_alone() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Prodigy([p])
    for _ in range(3):
        p.grad = torch.zeros(3)
        optimizer.step()
    assert torch.equal(p, torch.ones(3)) and float(optimizer.state[p]["d"]) == pytest.approx(1e-6)


def test_a_bad_first_estimate_is_refused() -> None:
    with pytest.raises(HyperparameterError, match="d0"):
        Prodigy(parameters(), d0=0.0)


def checks() -> list[Any]:
    subjects = [Subject(Prodigy, OPTIMIZERS[0].capabilities, options) for options in ({}, {"ecc": "bf16+8"})]
    found = [
        (c, s, () if s is subjects[0] else pytest.mark.broad) for s in subjects for c in CHECKS if c.applies(s.capabilities)
    ]
    return [pytest.param(c, s, id=f"{s}-{c.name}", marks=marks) for c, s, marks in found]


@pytest.mark.parametrize(("check", "subject"), checks())
def test_it_conforms(check: Check, subject: Subject) -> None:
    check.run(subject)


def test_the_entry_point_offers_it() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."hbcore.plugins"]\nhb_prodigy = "hb_prodigy.plugin"' in project
    registry = Registry(lambda: [EntryPoint("hb_prodigy", "hb_prodigy.plugin", "hbcore.plugins")])
    assert registry.get("prodigy") is Prodigy
