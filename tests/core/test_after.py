"""Rules at the stage "after": what the step made of the parameter, and what it was, whoever applied the step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core.kit import distance, gradients, mlp, one_of_each, parameters, run, same, train, values
from torch import Tensor

import hbcore
from hb_adam import SGD, AdamW
from hb_adam.schedule_free import ScheduleFree
from hb_muon.hyperball import HyperBall
from hbcore.api import Context, Domain, Extension, Optimizer, Route, Slot, State, Transform, is_matrix, matrix_view, zeros
from hbcore.errors import RuleError


@dataclass(frozen=True)
class Halfway(Transform):
    """Takes half of each step, and keeps what it was given."""

    name = "halfway"
    stage = "after"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"before": zeros(param), "applied": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return (u + c.param) / 2, {"before": c.param, "applied": u}


class HalfSteps(Extension):
    """Half of another optimizer's steps."""

    @classmethod
    def chain(cls, h: Any) -> tuple[Transform, ...]:
        return (Halfway(), *super().chain(h))  # wherever it is listed, its stage says when it runs


NAMES = [n for n in hbcore.list_optimizers() if not hbcore.info(n).spec.capabilities & {"closure", "sparse"}]


@pytest.mark.parametrize("name", one_of_each(NAMES))
def test_a_rule_after_any_optimizer_sees_both_parameters(name: str) -> None:
    """In each parameter's first step, which for some rules follows one that only primes."""
    plain, half = parameters(), parameters()
    before, steps = values(half), list(gradients(2))
    other = hbcore.get(name)(plain, compile="eager")
    optimizer = HalfSteps.over(name)(half, compile="eager", use_ema=True, ema_decay=0.25)
    seen = set()
    for grads in steps:
        run(other, plain, [grads])
        run(optimizer, half, [grads])
        for i in {i for i, p in enumerate(half) if optimizer.state[p]["step"] == 1} - seen:
            seen.add(i)
            state = optimizer.state[half[i]]
            assert torch.equal(state["before"], before[i]) and torch.equal(state["applied"], plain[i])
            assert torch.equal(half[i], (plain[i] + before[i]) / 2)
            assert distance([4 * state["param_ema"]], [half[i]]) < 1e-6  # the average is of what comes out
    assert seen == set(range(len(half)))


@pytest.mark.parametrize("name", one_of_each(["AdamW", "HyperBallAdamW", "MSAMLaProp", "SFAdamW", "Muon"]))
@pytest.mark.parametrize("backend", ["inductor", "cpp", "triton"])
def test_backends_agree_on_rules_after_the_step(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "inductor" and name != "HyperBallAdamW":
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    models = [mlp(), mlp()]
    for model, how in zip(models, ("eager", backend), strict=True):
        optimizer = HalfSteps.over(name)(model.named_parameters(), weight_decay=0.1, compile=how)
        train(model, optimizer, range(3))
    assert backend in optimizer.report.backend and not optimizer.report.reasons
    assert distance(models[1].parameters(), models[0].parameters()) < 1e-5


@dataclass(frozen=True)
class Rows(Transform):
    """A matrix rule after the step: every row keeps the length that it had."""

    name = "rows"
    stage = "after"
    domain = Domain.MATRIX
    needs = frozenset({"param"})

    def blocks(self, shape: torch.Size) -> Any:
        return matrix_view(shape)

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u * (c.param.norm(dim=-1, keepdim=True) / u.norm(dim=-1, keepdim=True)), {}


class Lengths(Extension):
    """Another optimizer's steps; the rows of matrices keep their lengths."""

    @classmethod
    def chain(cls, h: Any) -> tuple[Transform, ...]:
        return (*super().chain(h), Route(is_matrix, (Rows(),)))


@pytest.mark.parametrize("base", ["AdamW", "SFAdamW"])
def test_a_matrix_rule_may_follow_the_step(base: str) -> None:
    ours, theirs = parameters(((4, 3), (3,))), parameters(((4, 3), (3,)))
    lengths = ours[0].detach().norm(dim=-1)
    grads = [[torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(3)]]
    run(Lengths.over(base)(ours, lr=0.1), ours, grads)
    run(hbcore.get(base)(theirs, lr=0.1), theirs, grads)
    turned = theirs[0].detach()
    assert distance([ours[0]], [turned * (lengths / turned.norm(dim=-1))[:, None]]) < 1e-6
    assert same(ours[1:], theirs[1:])


@dataclass(frozen=True)
class Late(HyperBall):
    """An owner of the application at a stage where the step is applied already."""

    name = "late"
    stage = "after"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((Late(),), "'late'.*owns_apply.*set stage = 'apply'"),
        ((ScheduleFree(), HyperBall()), "'schedule_free' and 'hyperball' both apply the step"),
    ],
)
def test_a_step_is_applied_once(rules: tuple[Transform, ...], words: str) -> None:
    class Wrong(Optimizer):
        lr: float = 0.1

        @staticmethod
        def chain(h: Any) -> tuple[Transform, ...]:
            return rules

    with pytest.raises(RuleError, match=words):
        Wrong(parameters())


@dataclass(frozen=True)
class Anchored(Transform):
    """Keeps where the parameter was when the rule came to it."""

    name = "anchored"

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"anchor": Slot(param.shape, exact=True)}

    def joins(self, param: Tensor, step: Tensor) -> dict[str, Tensor]:
        return {"anchor": param}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return u, {"anchor": s["anchor"]}


class Anchor(Extension):
    """Another optimizer's steps; an anchor stays behind."""

    @classmethod
    def chain(cls, h: Any) -> tuple[Transform, ...]:
        return (Anchored(), *super().chain(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_slot_that_joins_at_the_parameters_value_is_not_the_parameter(dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    plain = SGD(params, lr=0.1)
    run(plain, params, gradients(1, dtype=dtype))
    before, optimizer = values(params), Anchor.over(SGD)(params, lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    run(optimizer, params, gradients(2, dtype=dtype))
    assert same([optimizer.state[p]["anchor"].to(dtype) for p in params], before)
    assert not same(params, before)


def test_no_step_is_taken_after_an_overflow() -> None:
    """A rule after the step is skipped with the step."""
    model = mlp()
    optimizer = HalfSteps.over(SGD)(model.named_parameters(), capturable=True, compile="eager")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    before = values(model.parameters())
    train(model, optimizer, range(1))
    assert same(model.parameters(), before) and not any(s["applied"].any() for s in optimizer.state.values())


def test_gradients_that_are_missing_leave_all_as_it_is() -> None:
    params = parameters(((2, 3), (4,)))
    optimizer = HalfSteps.over(AdamW)(params)
    run(optimizer, params, [[torch.ones(2, 3), torch.ones(4)]])
    kept = copy.deepcopy((values(params), values(optimizer.state[params[1]].values())))
    run(optimizer, params, [[torch.ones(2, 3), None]])
    assert torch.equal(params[1], kept[0][1]) and same(optimizer.state[params[1]].values(), kept[1])
