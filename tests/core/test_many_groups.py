"""Param groups that differ in a learning rate, as layer-wise decay makes hundreds of: one call of a rule takes all of them."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core.kit import distance, gradients, one_of_each, parameters, run, same, values
from torch import Tensor

import hbcore
from hbcore.api import Domain, Optimizer, Transform, hyper, matrix_view
from hbcore.checkpoint.save import record_of
from hbcore.engine.backends.chunking import Pack
from hbcore.engine.stacks.rule_call import RuleCall
from hbcore.errors import OptionError, SparseGradientError

SHAPES = ((6, 5), (6, 5), (4, 4), (7,), (6, 5), (4, 4), (3,), (6, 5))
FEW = {"AdamW": 27, "SGD": 24, "SFAdamW": 55, "Muon": 44, "SOAP": 46, "PSGDKron": 50}
"""Calls that a group may add to a step."""
RATES = [0.02 * 0.8**i for i in range(len(SHAPES))]


MATRIX = [
    "Adafactor", "Adams", "HeavyKLSOAP", "HeavyKLShampoo", "HeavySOAP", "HeavySOAPAdEMAMix", "HeavySOAPNAdam", "HeavySOLP",
    "KLSOAP", "KLShampoo", "LATHER", "Muon", "MuonAdamW", "MuonLaProp", "PSGDKron", "PSGDLRA", "PSGDPRO", "QSGD", "SFSOAP",
    "SOAP", "SOAPAdEMAMix", "SOAPNAdam", "SOLP",
    "SUDSAdamW", "Scion",
]  # fmt: skip
"""The registered optimizers that hand a matrix to a rule of ``Domain.MATRIX``."""
SHARING = [name for name in MATRIX if name != "PSGDLRA"]  # whose groups have a preconditioner each


def grouped(params: Sequence[Tensor], rates: Sequence[float] | None = RATES, **entries: Any) -> list[dict[str, Any]]:
    """A group for each parameter, with a learning rate of its own and the name by which its noise is drawn."""
    named = [[(f"layer.{i}", p)] for i, p in enumerate(params)]
    return [{"params": some, **({"lr": rates[i]} if rates else {}), **entries} for i, some in enumerate(named)]


def make(name: str, groups: Any, **options: Any) -> Any:
    return hbcore.get(name)(groups, compile="eager", **options)


def apart(name: str, steps: Sequence[Sequence[Tensor | None]], dtype: torch.dtype = torch.float64, write: Any = None):
    """Each parameter trained by an optimizer of its own."""
    params = parameters(SHAPES, dtype)
    for i, group in enumerate(grouped(params)):
        optimizer = make(name, [group])
        for t, step in enumerate(steps):
            if write is not None:
                write(t, i, optimizer.param_groups[0])
            run(optimizer, [params[i]], [[step[i]]])
    return params


def calls_of(optimizer: Any) -> int:
    """How often the last step called a matrix rule."""
    return sum(len(level._calls) for level in optimizer.core.plan.layout.levels)


@pytest.mark.filterwarnings("ignore")
def test_these_are_all_matrix_optimizers():
    found = []
    for name in hbcore.list_optimizers():
        p = torch.nn.Parameter(torch.ones(6, 5))
        p.grad = torch.ones(6, 5)
        try:
            optimizer = make(name, [p])
            optimizer.step()
        except (OptionError, SparseGradientError):  # a wrapper, which needs a closure; sparse gradients
            continue
        if optimizer.core.plan.layout.levels:
            found.append(name)
    assert sorted(found) == sorted(MATRIX)


@pytest.mark.parametrize("name", one_of_each(n for n in SHARING if n != "SFSOAP"))  # whose average counts a group's own steps
def test_groups_of_the_same_numbers_are_one_group_bit_for_bit(name):
    one, many = parameters(SHAPES), parameters(SHAPES)
    first = make(name, [{"params": [(f"layer.{i}", p) for i, p in enumerate(one)]}])
    second = make(name, grouped(many, None))
    for grads in gradients(5, SHAPES):
        run(first, one, [grads])
        run(second, many, [grads])
    assert same(one, many)
    assert calls_of(first) == calls_of(second)


@pytest.mark.parametrize("name", one_of_each(SHARING))
def test_groups_with_learning_rates_of_their_own_are_optimizers_of_their_own(name):
    params, steps = parameters(SHAPES, torch.float64), list(gradients(6, SHAPES, torch.float64))
    optimizer = make(name, grouped(params))
    run(optimizer, params, steps)
    assert distance(params, apart(name, steps)) < 1e-9
    first = parameters(SHAPES)
    one = make(name, first)
    run(one, first, gradients(6, SHAPES))
    assert calls_of(optimizer) == calls_of(one)
    assert not optimizer.report.notes


@pytest.mark.parametrize("name", ["Muon", "SOAP", "PSGDKron"])
def test_the_triton_backend_runs_groups_together_too(name):
    reached = []
    for backend in ("eager", "triton"):
        params = parameters(SHAPES)
        optimizer = hbcore.get(name)(grouped(params), compile=backend)
        run(optimizer, params, gradients(4, SHAPES))
        assert optimizer.report.backend == backend
        reached.append((params, calls_of(optimizer)))
    assert distance(reached[0][0], reached[1][0]) < (1e-3 if name == "Muon" else 2e-5)
    assert reached[0][1] == reached[1][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "use_ema": True}], ids=["plain", "decayed"])
@pytest.mark.parametrize("name", one_of_each(["AdamW", "SFAdamW", "SGD", "Lion", "RMSprop", "NAdam", "AdEMAMix", "LaProp"]))
def test_small_tensors_of_groups_are_packed_without_another_bit(name, options, dtype):
    """A number of its own for each group is spread over the elements of one call, which must not change how it is rounded."""
    params, alone, steps = parameters(SHAPES, dtype), parameters(SHAPES, dtype), list(gradients(5, SHAPES, dtype))
    optimizer = make(name, grouped(params), **options)
    run(optimizer, params, steps)
    for i, group in enumerate(grouped(alone)):
        run(make(name, [group], **options), [alone[i]], [[step[i]] for step in steps])
    assert same(params, alone)
    [batch] = optimizer.core.plan.layout.batches
    assert [type(chunk) for chunk in batch.segment.executable._chunked.of(0, batch)] == [Pack]


def test_a_group_with_many_elements_has_a_pack_of_its_own():
    """Spreading its numbers would cost more memory traffic than a call."""
    params = parameters([(200, 100), (200, 100), (3,), (4,), (5,)])
    optimizer = make("AdamW", [{"params": params[:2]}, *({"params": [p], "lr": 0.1} for p in params[2:])])
    run(optimizer, params, [[torch.ones_like(p) for p in params]])
    [batch] = optimizer.core.plan.layout.batches
    packs = batch.segment.executable._chunked.of(0, batch)
    assert [(pack.members, pack.rows) for pack in packs] == [([0, 1], None), ([2, 3, 4], [1, 2, 3])]


@pytest.mark.parametrize("name", one_of_each(SHARING))
def test_many_groups_resume_bit_for_bit(name):
    """One group joined late, so that it is at another step, and at another place between two refreshes."""
    steps = list(gradients(9, SHAPES))
    params, last = parameters(SHAPES), len(SHAPES) - 1
    optimizer = make(name, grouped(params)[:last])
    run(optimizer, params[:last], [step[:last] for step in steps[:3]])
    optimizer.add_param_group(grouped(params)[last])
    run(optimizer, params, steps[3:5])
    others = parameters(SHAPES)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    resumed = make(name, grouped(others))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, steps[5:])
    run(resumed, others, steps[5:])
    assert same(params, others)
    assert not optimizer.report.notes and not resumed.report.notes


@pytest.mark.parametrize("name", one_of_each(SHARING))
def test_groups_whose_numbers_drift_apart_and_meet_again_stay_right(name):
    """Every number that some matrix rule reads is changed in two of the groups for a while."""
    params, steps = parameters(SHAPES, torch.float64), list(gradients(8, SHAPES, torch.float64))
    optimizer = make(name, grouped(params))
    run(optimizer, params, steps[:1])
    [level] = optimizer.core.plan.layout.levels
    read = {key.partition(".")[0] for s in level.stacks for key in (s.key.spec.numbered[k] for k in s.reads)}
    usual = {key: optimizer.param_groups[0][key] for key in read}
    assert read and "lr" not in read

    def write(t, i, group):
        for key, value in usual.items():
            other = tuple(0.9 * v for v in value) if isinstance(value, tuple) else 0.9 * value
            group[key] = other if i in (1, 4) and 3 <= t < 6 else value

    params = parameters(SHAPES, torch.float64)
    optimizer, counts = make(name, grouped(params)), []
    for t, grads in enumerate(steps):
        for i, group in enumerate(optimizer.param_groups):
            write(t, i, group)
        run(optimizer, params, [grads])
        counts.append(calls_of(optimizer))
    assert distance(params, apart(name, steps, write=write)) < 1e-9
    assert counts[3:6] == [counts[2] + 1] * 3 and counts[6:] == [counts[2]] * 2
    assert any("share a stack had other numbers" in note for note in optimizer.report.notes)


@pytest.mark.parametrize("name", one_of_each(SHARING))
def test_groups_without_a_gradient_at_times_stay_right(name):
    steps = [[None if (t + i) % 3 == 0 else g for i, g in enumerate(some)]
             for t, some in enumerate(gradients(7, SHAPES, torch.float64))]  # fmt: skip
    params = parameters(SHAPES, torch.float64)
    run(make(name, grouped(params)), params, steps)
    assert distance(params, apart(name, steps)) < 1e-9


@dataclass(frozen=True)
class Counting(Transform):
    """Carries a number that follows a hyperparameter, and scales its update by it."""

    gain: float = hyper(1.0)
    name = "counting"
    domain = Domain.MATRIX

    def blocks(self, shape):
        return matrix_view(shape)

    def scalars(self):
        return {"total": 0.0}

    def update(self, u, s, c):
        return u * (s["total"] + self.gain), {"total": s["total"] + self.gain}


class Counted(Optimizer):
    lr: float = 1.0
    gain: float = 1.0

    @staticmethod
    def chain(h):
        return (Counting(h.gain),)


class Computing(Counted):
    @staticmethod
    def chain(h):
        return (Counting(h.gain * h.lr),)


@dataclass(frozen=True)
class Closed(Counting):
    scale: Any = None

    def update(self, u, s, c):
        update, new = super().update(u, s, c)
        return update * self.scale(), new


class Closing(Counted):
    @staticmethod
    def chain(h):
        return (Closed(h.gain, lambda: h.lr),)


def moved(cls, groups, steps=3):
    """How far each step moves a parameter of each group, for gradients of ones."""
    params = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)) for _ in groups]
    optimizer = cls([{"params": [p], **g} for p, g in zip(params, groups, strict=True)], compile="eager")
    seen = []
    for _ in range(steps):
        before = values(params)
        run(optimizer, params, [[torch.ones(2, 2, dtype=torch.float64) for _ in params]])
        seen.append([float((b - p.detach()).mean()) for b, p in zip(before, params, strict=True)])
    return optimizer, seen


def test_what_a_rule_carries_goes_to_every_group_of_its_call():
    rates, gains = [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 0.5, 1.0]
    optimizer, seen = moved(Counted, [{"lr": r, "gain": g} for r, g in zip(rates, gains, strict=True)])
    assert seen == [pytest.approx([t * r * g for r, g in zip(rates, gains, strict=True)]) for t in (1, 2, 3)]
    assert [scalars["total"] for scalars in optimizer.core.group_scalars] == [3.0, 3.0, 1.5, 3.0]
    assert calls_of(optimizer) == 2


def test_groups_that_carry_other_numbers_share_no_call():
    params = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)) for _ in range(2)]
    optimizer = Counted([{"params": [p]} for p in params], compile="eager")
    for gain in (1.0, 3.0, 1.0):
        optimizer.param_groups[1]["gain"] = gain
        run(optimizer, params, [[torch.ones(2, 2, dtype=torch.float64)] * 2])
    assert [float(p.detach().mean()) for p in params] == [-(1 + 2 + 3), -(1 + 4 + 5)]
    assert calls_of(optimizer) == 2


@dataclass(frozen=True)
class Doubling(Counting):
    """Doubles its update where it refreshes, in every second step of the group."""

    name = "doubling"

    def scalars(self):
        return {}

    def rate(self, k):
        return 0.5

    def update(self, u, s, c):
        return u * (2 if c.refresh else 1), {}


class Doubled(Counted):
    @staticmethod
    def chain(h):
        return (Doubling(h.gain),)


def test_groups_that_refresh_in_other_steps_share_no_call():
    """Both parameters are at the same step; the first one's group counts a step that another of its parameters took."""
    params = [torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)) for _ in range(3)]
    optimizer = Doubled([{"params": [params[0], params[2]]}, {"params": [params[1]]}], compile="eager")
    ones = torch.ones(2, 2, dtype=torch.float64)
    run(optimizer, params, [[None, None, ones]] + [[ones, ones, None]] * 3)
    assert [float(p.detach().mean()) for p in params] == [-(2 + 1 + 2), -(1 + 2 + 1), -1]


def test_groups_share_no_call_where_a_chain_computes_with_numbers():
    rates = [1.0, 2.0, 2.0]
    optimizer, seen = moved(Computing, [{"lr": r} for r in rates])
    assert seen == [pytest.approx([t * r * r for r in rates]) for t in (1, 2, 3)]
    assert calls_of(optimizer) == 2


def test_groups_share_no_call_where_a_rule_may_read_a_number_from_a_closure():
    rates = [1.0, 2.0, 2.0]
    optimizer, seen = moved(Closing, [{"lr": r} for r in rates])
    assert seen == [pytest.approx([t * r * r for r in rates]) for t in (1, 2, 3)]
    assert calls_of(optimizer) == 2


@pytest.mark.parametrize("name", one_of_each(SHARING))
def test_a_rule_is_called_once_for_hundreds_of_groups(name, monkeypatch):
    ran = []
    call = RuleCall.run
    monkeypatch.setattr(RuleCall, "run", lambda self, *_: ran.append(len(self._arguments)) or call(self))
    params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(200)]
    optimizer = make(name, [{"params": [p], "lr": 0.01 * 0.99**i} for i, p in enumerate(params)])
    for _ in range(3):
        ran.clear()
        run(optimizer, params, [[torch.randn(4, 3) for _ in params]])
        assert ran == [1]


def counted(run_once: Any) -> int:
    """How many functions, of Python and of C, a call runs."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run_once()
    finally:
        sys.setprofile(before)
    return calls


def stepped(name: str, count: int, groups: bool, steps: int = 3) -> tuple[Any, list[Tensor]]:
    """An optimizer of ``count`` matrices that is about to step."""
    params = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(count)]
    made = [{"params": [p], "lr": 0.01 * 0.99**i} for i, p in enumerate(params)]
    optimizer = make(name, made if groups else params, consume_grad=False)
    for p in params:
        p.grad = torch.randn(4, 3)
    for _ in range(steps):
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize(("name", "most"), FEW.items())
def test_a_step_costs_few_calls_for_each_group(name, most):
    """Beside the same matrices in one group."""
    many, one = (counted(stepped(name, 100, groups)[0].step) for groups in (True, False))
    assert 0 < (many - one) / 100 <= most


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "SOAP"])
def test_reading_the_groups_after_a_step_costs_few_calls_for_each(name):
    optimizer, _ = stepped(name, 100, groups=True)
    optimizer.param_groups[3]["weight_decay"] = 0.5
    optimizer.step()
    assert counted(lambda: optimizer.param_groups) / 100 <= 16
    core = optimizer.core
    assert [group["hbcore"] for group in core.groups] == [record_of(core, g, live=True).dump() for g in range(100)]
    assert all(json.loads(group["hbcore"])["progress"]["step"] == 4 for group in core.groups)
