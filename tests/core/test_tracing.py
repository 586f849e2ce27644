"""The tracing contract: what a rule may do, what it may not, and what happens then."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch
from core.kit import distance, optimizer_of, parameters, run, same

from hbcore.api import Domain, Transform, hyper, zeros
from hbcore.engine.graph.trace import trace
from hbcore.errors import FallbackWarning, RuleError, TraceError
from hbcore.rules.stages import ORDER, arrange

SHAPES = ((3, 4), (5,), (1,), ())


class Rule(Transform):
    """Rules of these tests write ``line`` where the offence is, by the comment ``# here``."""

    name = "rule"

    @classmethod
    def line(cls):
        import inspect

        source, start = inspect.getsourcelines(cls)
        return start + next(i for i, text in enumerate(source) if "# here" in text)


@dataclass(frozen=True)
class RawSum(Rule):
    def update(self, u, s, c):
        return u / u.abs().sum(), {}  # here


@dataclass(frozen=True)
class RawMean(Rule):
    def update(self, u, s, c):
        return u - u.mean(), {}  # here


@dataclass(frozen=True)
class RawNorm(Rule):
    def update(self, u, s, c):
        return u / (1 + torch.linalg.vector_norm(u)), {}  # here


@dataclass(frozen=True)
class RawLogSumExp(Rule):
    def update(self, u, s, c):
        return u - u.logsumexp(0), {}  # here


@dataclass(frozen=True)
class RawMedian(Rule):
    def update(self, u, s, c):
        return u - u.median(), {}  # here


@dataclass(frozen=True)
class Branch(Rule):
    strength: float = hyper(0.5)

    def update(self, u, s, c):
        if self.strength > 0:  # here
            u = u * self.strength
        return u, {}


@dataclass(frozen=True)
class BranchOnStep(Rule):
    def update(self, u, s, c):
        return (u if c.step > 1 else 2 * u), {}  # here


@dataclass(frozen=True)
class Length(Rule):
    def update(self, u, s, c):
        return u / u.numel(), {}  # here


@dataclass(frozen=True)
class BranchOnLength(Rule):
    def update(self, u, s, c):
        return (u * 2 if u.numel() > 1000 else u / 2), {}  # here


@dataclass(frozen=True)
class InPlace(Rule):
    def slots(self, param):
        return {"m": zeros(param)}

    def update(self, u, s, c):
        m = s["m"].mul_(0.5)  # here
        return u + m, {"m": m + u}


@dataclass(frozen=True)
class InPlaceOfItsOwn(Rule):
    """What :class:`Pure` says, written to a tensor that the rule made itself."""

    def slots(self, param):
        return {"m": zeros(param)}

    def update(self, u, s, c):
        m = s["m"] * 0.25
        m.mul_(2)  # here
        return u + m, {"m": m + u}


@dataclass(frozen=True)
class Running(Rule):
    def update(self, u, s, c):
        return u.cumsum(0), {}  # here


@dataclass(frozen=True)
class Flipped(Rule):
    def update(self, u, s, c):
        return u.flip(0), {}  # here


@dataclass(frozen=True)
class Softmax(Rule):
    def update(self, u, s, c):
        return u.softmax(0), {}  # here


@dataclass(frozen=True)
class Undeclared(Rule):
    def update(self, u, s, c):
        return u - c.mean(u), {}  # here


OFFENCES = {
    RawSum: "c.sum", RawMean: "c.mean", RawNorm: "c.norm",
    RawLogSumExp: "elementwise|reduces", RawMedian: "elementwise|reduces",
    Branch: "torch.where", BranchOnStep: "torch.where",
    Length: "c.numel", BranchOnLength: "c.numel", InPlace: "out-of-place", InPlaceOfItsOwn: "out-of-place",
    Running: "elementwise", Flipped: "elementwise", Softmax: "elementwise",
    Undeclared: "Domain.TENSOR",
}  # fmt: skip


def traced(rule, **options):
    cls = optimizer_of(rule)
    [p] = parameters([(3, 4)])
    optimizer = cls([p], **options)
    spec = optimizer.core.chain.spec(optimizer.param_groups[0])
    dtypes = {"param": torch.float32, "grad": torch.float32}
    dtypes |= dict.fromkeys(rule().slots(p), torch.float32)
    return trace(spec, dtypes)


def gradients_of(params, steps):
    return [[torch.linspace(-1, 2, p.numel()).view(p.shape) * (k + 1) for p in params] for k in range(steps)]


@pytest.mark.parametrize("rule", OFFENCES, ids=lambda r: r.__name__)
def test_a_breach_of_the_contract_names_its_line_and_the_remedy(rule):
    with pytest.raises(RuleError if rule is InPlace else TraceError, match=f"{__file__}:{rule.line()}: .*({OFFENCES[rule]})"):
        traced(rule)


@dataclass(frozen=True)
class Pure(Rule):
    """What :class:`InPlace` means."""

    def slots(self, param):
        return {"m": zeros(param)}

    def update(self, u, s, c):
        m = 0.5 * s["m"]
        return u + m, {"m": m + u}


@dataclass(frozen=True)
class ByTheBook(Rule):
    """What :class:`RawMean` means."""

    domain = Domain.TENSOR

    def update(self, u, s, c):
        return u - c.mean(u), {}


@dataclass(frozen=True)
class Always(Rule):
    """What :class:`Branch` means at its default."""

    def update(self, u, s, c):
        return u * 0.5, {}


@dataclass(frozen=True)
class BranchOnMean(Rule):
    """A rule that reduces, as it may, and branches, as it may not: it falls back with whole tensors in view."""

    domain = Domain.TENSOR

    def update(self, u, s, c):
        return (u - c.mean(u) if c.step > 0 else u), {}  # here


@pytest.mark.parametrize(
    ("offender", "meant"), [(InPlaceOfItsOwn, Pure), (RawMean, ByTheBook), (Branch, Always), (BranchOnMean, ByTheBook)]
)
def test_a_rule_that_cannot_be_fused_runs_with_one_warning_and_right_results(offender, meant):
    params, expected = parameters(SHAPES), parameters(SHAPES)
    optimizer, fused = optimizer_of(offender)(params), optimizer_of(meant)(expected)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, params, gradients_of(params, 4))
    assert [w.category for w in caught] == [FallbackWarning]
    assert f"{__file__}:{offender.line()}" in str(caught[0].message)
    assert len(optimizer.report.reasons) == 1
    run(fused, expected, gradients_of(params, 4))
    assert fused.report.reasons == []
    assert distance(params, expected) < 1e-6


@dataclass(frozen=True)
class Normalized(Rule):
    """A reduction that depends on another one, on a slot, on a hyperparameter and on the length."""

    domain = Domain.TENSOR
    strength: float = hyper(0.5)

    def slots(self, param):
        return {"m": zeros(param)}

    def update(self, u, s, c):
        m = 0.9 * s["m"] + u
        centred = m - c.mean(m)
        scaled = centred / (c.norm(centred) + self.strength) * c.numel.sqrt()
        return scaled / (1 + c.amax(scaled.abs())), {"m": m}


@pytest.mark.parametrize("backend", ["eager", "cpp", "inductor"])
def test_a_tensor_rule_runs_in_as_many_phases_as_its_reductions_need(backend):
    program = traced(Normalized)
    assert [[r.how for r in phase.reduces] for phase in program.phases] == [["sum"], ["sum"], ["amax"], []]
    shapes = (*SHAPES, (200, 200)) if backend == "eager" else SHAPES  # large tensors have graphs of their own, and seconds
    params, expected = parameters(shapes), parameters(shapes)
    optimizer = optimizer_of(Normalized)(params, compile=backend)
    run(optimizer, params, gradients_of(params, 3))
    assert (optimizer.report.backend, optimizer.report.reasons) == (backend, [])
    with torch.no_grad():
        for p, grads in zip(expected, zip(*gradients_of(params, 3), strict=True), strict=True):
            m = torch.zeros_like(p)
            for g in grads:
                m = 0.9 * m + g
                centred = m - m.mean()
                scaled = centred / (centred.norm() + 0.5) * p.numel() ** 0.5
                p -= 0.1 * scaled / (1 + scaled.abs().max())
    assert distance(params, expected) < 1e-6


@dataclass(frozen=True)
class Delay(Rule):
    """Slots that hand their values on: the new value of one is the old value of the other."""

    def slots(self, param):
        return {"newer": zeros(param), "older": zeros(param)}

    def update(self, u, s, c):
        return s["older"], {"newer": u, "older": s["newer"]}


@dataclass(frozen=True)
class UnfusedDelay(Delay):
    def update(self, u, s, c):
        assert float(c.step) > 0  # turns a scalar into a number, which cannot be traced
        return super().update(u, s, c)


@pytest.mark.filterwarnings("ignore::hbcore.errors.FallbackWarning")
@pytest.mark.parametrize(
    ("rule", "backend"), [(Delay, "eager"), pytest.param(Delay, "inductor", marks=pytest.mark.full), (UnfusedDelay, "eager")]
)
def test_slots_may_trade_places(rule, backend):
    params = parameters(SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = optimizer_of(rule)(params, lr=1.0, compile=backend)
    grads = gradients_of(params, 4)
    run(optimizer, params, grads)
    assert same([optimizer.state[p]["newer"] for p in params], grads[3])
    assert same([optimizer.state[p]["older"] for p in params], grads[2])
    assert distance(params, [b - g0 - g1 for b, g0, g1 in zip(before, grads[0], grads[1], strict=True)]) < 1e-6


@dataclass(frozen=True)
class Constants(Rule):
    def slots(self, param):
        return {"m": zeros(param)}

    def update(self, u, s, c):
        half = torch.tensor(0.5)
        return u * half + torch.zeros_like(u), {"m": torch.full_like(u, 3.0)}


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_constants_are_welcome_in_a_rule(backend):
    params = parameters(SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = optimizer_of(Constants)(params, lr=1.0, compile=backend)
    [grads] = gradients_of(params, 1)
    run(optimizer, params, [grads])
    assert optimizer.report.reasons == []
    assert distance(params, [b - 0.5 * g for b, g in zip(before, grads, strict=True)]) < 1e-6
    assert all((optimizer.state[p]["m"] == 3).all() for p in params)


@dataclass(frozen=True)
class GlobalNorm(Rule):
    domain = Domain.MODEL

    def update(self, u, s, c):
        return u / c.norm(u), {}


def test_a_model_rule_sees_the_whole_model():
    params = parameters([(3,), (4,)])
    before = [p.detach().clone() for p in params]
    optimizer = optimizer_of(GlobalNorm)(params, lr=1.0, compile="eager")
    run(optimizer, params, [[torch.ones_like(p) for p in params]])
    assert optimizer.report.reasons == []
    assert distance(params, [b - 7**-0.5 for b in before]) < 1e-6


@dataclass(frozen=True)
class Copycat(Pure):
    name = "copycat"


def test_two_transforms_may_not_claim_one_slot():
    with pytest.raises(ValueError, match=r"rule.*copycat.*'m'|'m'.*rule.*copycat"):
        optimizer_of(Pure, Copycat)(parameters())


@dataclass(frozen=True)
class Placed(Transform):
    at: str = "rule"

    @property
    def stage(self):
        return self.at


def test_the_order_of_the_stages():
    assert ORDER == (
        "mars", "clip_gradient", "couple_decay", "rule", "clip_update",
        "caution", "weight_decay", "lr", "apply", "after", "parameter_ema",
    )  # fmt: skip
    shuffled = [Placed(stage) for stage in sorted(ORDER)]
    assert tuple(t.at for t in arrange(shuffled)) == ORDER


def test_transforms_of_one_stage_keep_the_order_they_came_in():
    first, second = Pure(), Always()
    assert arrange([Placed("lr"), first, second, Placed("mars")])[1:3] == (first, second)
