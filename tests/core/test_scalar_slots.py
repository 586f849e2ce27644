"""Scalar slots: one number for each parameter, or for the model, that depends on reductions; DoG and Prodigy need them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from core.dog import DoG, LDoG
from core.kit import distance, gradients, parameters, run

from hbcore.api import Domain, Optimizer, Slot, Transform, scalar
from hbcore.errors import RuleError, TraceError

SHAPES = ((6, 5), (5,), (4, 4), ())


def reference(params, steps, whole, first=1e-2):
    """L-DoG and DoG in float64, from the paper."""
    x = [p.detach().double().clone() for p in params]
    x0, groups = copy.deepcopy(x), [range(len(x))] if whole else [[i] for i in range(len(x))]

    def norm(some, members):
        return sum(float((some[i] ** 2).sum()) for i in members) ** 0.5

    moved = [first * (1 + norm(x, members)) for members in groups]
    squares = [1e-8] * len(groups)
    for grads in steps:
        g = [each.double() for each in grads]
        for k, members in enumerate(groups):
            moved[k] = max(moved[k], norm([a - b for a, b in zip(x, x0, strict=True)], members))
            squares[k] += norm(g, members) ** 2
            for i in members:
                x[i] = x[i] - g[i] * moved[k] / squares[k] ** 0.5
    return x, moved, squares


def trained(cls, steps=5, **options):
    params = parameters(SHAPES)
    optimizer = cls(list(zip("abcd", params, strict=True)), **options)
    run(optimizer, params, gradients(steps, SHAPES))
    return params, optimizer


@pytest.mark.parametrize("backend", ["eager", "triton", "cpp", "inductor"])
@pytest.mark.parametrize("cls", [LDoG, DoG])
def test_the_paper(cls, backend):
    params, optimizer = trained(cls, compile=backend)
    expected, moved, squares = reference(parameters(SHAPES), gradients(5, SHAPES), cls is DoG)
    assert optimizer.report.backend == backend
    assert distance(params, expected) < 1e-6
    for i, p in enumerate(params):
        k = 0 if cls is DoG else i
        held = optimizer.state[p]
        assert held["moved"].shape == held["squares"].shape == ()
        assert float(held["moved"]) == pytest.approx(moved[k], rel=1e-5)  # x is within 1e-6 of it, and a tenth as far from x_0
        assert float(held["squares"]) == pytest.approx(squares[k], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"ecc": "bf16+8"}, {"capturable": True}, {"multi_tensor": False}], ids=str)
@pytest.mark.parametrize("cls", [LDoG, DoG])
def test_a_resumed_run_is_the_same_bit_for_bit(cls, options):
    steps = list(gradients(6, SHAPES))
    params = parameters(SHAPES)
    before = cls(params, compile="eager", **options)
    run(before, params, steps[:3])
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    after = cls(resumed, compile="eager", first=0.5, **options)
    after.load_state_dict(before.state_dict())
    run(before, params, steps[3:])
    run(after, resumed, steps[3:])
    assert all(map(torch.equal, params, resumed))


def test_parameters_of_several_groups_and_steps():
    """Rows with other numbers, and a parameter that sits out at times, with numbers of its own."""
    params, alone = parameters(SHAPES), parameters(SHAPES)
    together = LDoG([{"params": params[:2]}, {"params": params[2:], "first": 0.1}], compile="eager")
    single = [LDoG([p], first=0.1 if i >= 2 else 1e-2, compile="eager") for i, p in enumerate(alone)]
    for t, grads in enumerate(gradients(5, SHAPES)):
        for i, (p, q, g) in enumerate(zip(params, alone, grads, strict=True)):
            p.grad, q.grad = (None, None) if (t + i) % 3 == 0 else (g.clone(), g.clone())
        together.step()
        for optimizer in single:
            optimizer.step()
    assert all(map(torch.equal, params, alone))


def test_a_late_parameter_begins_with_the_models_number():
    params, optimizer = trained(DoG, compile="eager")
    late = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "param_names": ["late"]})
    before = float(optimizer.state[params[0]]["squares"])
    late.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.state[late]["squares"]) == pytest.approx(before + 3, rel=1e-6)


def test_a_parameter_that_sits_out_has_the_models_number_when_it_returns():
    params, optimizer = trained(DoG, compile="eager")
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len({float(optimizer.state[p]["squares"]) for p in params}) == 1


def test_skipped_steps_leave_scalars_alone():
    params, optimizer = trained(LDoG, compile="eager", skip_nonfinite=True)
    before = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    assert all(torch.equal(optimizer.state[params[0]][k], v) for k, v in before.items())


@dataclass(frozen=True)
class Counting(Transform):
    """A number of the group's that depends on the model: the sum of all gradients' norms so far."""

    name = "counting"
    domain = Domain.MODEL

    def scalars(self):
        return {"total": 0.0}

    def update(self, u, s, c):
        total = s["total"] + c.norm(u)
        return u / total, {"total": total}


class Counted(Optimizer):
    lr: float = 0.1

    @staticmethod
    def chain(h):
        return (Counting(),)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_number_of_the_group_may_depend_on_the_model(backend):
    params, optimizer = trained(Counted, compile=backend)
    x, total = [p.detach().double() for p in parameters(SHAPES)], 0.0
    for grads in gradients(5, SHAPES):
        total += float(sum((g.double() ** 2).sum() for g in grads)) ** 0.5
        x = [p - 0.1 * g.double() / total for p, g in zip(x, grads, strict=True)]
    assert distance(params, x) < 1e-6
    assert f'"total": {total:.3f}'[:-1] in optimizer.param_groups[0]["hbcore"]


def rule_of(domain, slots, update):
    @dataclass(frozen=True)
    class Rule(Transform):
        name = "r"

        def slots(self, param):
            return slots(param)

        def update(self, u, s, c):
            return update(u, s, c)

    Rule.domain = domain

    class Built(Optimizer):
        lr: float = 0.1

        @staticmethod
        def chain(h):
            return (Rule(),)

    return Built


def test_an_elementwise_rule_has_no_scalar_slot():
    cls = rule_of(Domain.ELEMENTWISE, lambda p: {"d": scalar()}, lambda u, s, c: (u, {"d": s["d"]}))
    with pytest.raises(RuleError, match=r"slot 'd' is a scalar, which rules of Domain\.TENSOR and Domain\.MODEL may have"):
        cls(parameters(SHAPES))


def test_a_scalar_slot_has_no_shape():
    slots = lambda p: {"d": Slot(p.shape, scalar=True)}  # noqa: E731
    cls = rule_of(Domain.TENSOR, slots, lambda u, s, c: (u, {"d": s["d"]}))
    with pytest.raises(RuleError, match=r"is a scalar and has shape \(6, 5\); call scalar\(fill\)"):
        cls(parameters(SHAPES))


def test_a_tensor_for_a_scalar_slot_is_named():
    cls = rule_of(Domain.TENSOR, lambda p: {"d": scalar()}, lambda u, s, c: (u, {"d": u * u}))
    params = parameters([(6, 5)])
    optimizer = cls(params, compile="eager")
    params[0].grad = torch.ones(6, 5)
    with pytest.raises(RuleError, match=r"for the slot 'd', which is one number; reduce it with c\.sum"):
        optimizer.step()


def test_a_number_of_the_group_does_not_depend_on_one_tensor():
    @dataclass(frozen=True)
    class Own(Counting):
        name = "own"
        domain = Domain.TENSOR

    class Owned(Optimizer):
        lr: float = 0.1

        @staticmethod
        def chain(h):
            return (Own(),)

    params = parameters([(6, 5)])
    optimizer = Owned(params, compile="eager")
    params[0].grad = torch.ones(6, 5)
    with pytest.raises(TraceError, match="'total' is carried by the group and must not depend on one tensor"):
        optimizer.step()
