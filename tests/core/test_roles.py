"""Options act on what a hyperparameter is declared to be, not on what it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from core.kit import gradients, parameters, run

import hbcore
from hb_adam import AdamW
from hbcore.api import Domain, Optimizer, Parallel, Route, ScaleByAdam, Transform, debiased, ema, hyper, is_matrix, zeros
from hbcore.errors import OptionError, RuleError
from hbcore.rules import roles

SHAPES = ((4, 3), (5,))


@dataclass(frozen=True)
class Renamed(Transform):
    """Adam under a stranger's names: ``mu``, ``beta2``, and an ``alpha`` that is no decay rate but scales the update."""

    mu: float = hyper(0.9, ge=0, lt=1, role="first_moment")
    beta2: float = hyper(0.99, ge=0, lt=1, role="second_moment")
    alpha: float = hyper(1.0)
    shrink: float = hyper(0.0, ge=0, role="weight_decay")
    name = "renamed"

    def slots(self, param):
        return {"exp_avg": zeros(param), "exp_avg_sq": zeros(param)}  # no basis: that says nothing of the option either

    def update(self, u, s, c):
        m, m_hat = debiased(s["exp_avg"], u, self.mu, c.step)
        v, v_hat = debiased(s["exp_avg_sq"], u * u, self.beta2, c.step)
        u = c.divide(m_hat, v_hat.sqrt(), 1e-8) * self.alpha + self.shrink * c.param
        return u, {"exp_avg": m, "exp_avg_sq": v}


class Stranger(Optimizer):
    def __init__(self, params, lr=0.0025, mu=0.9, beta2=0.99, alpha=1.0, shrink=0.0, **options):
        super().__init__(params, {"lr": lr, "mu": mu, "beta2": beta2, "alpha": alpha, "shrink": shrink}, options)

    @staticmethod
    def chain(h):
        return (Renamed(h.mu, h.beta2, h.alpha, h.shrink),)


@dataclass(frozen=True)
class Undeclared(Transform):
    """The names that the options used to guess by, and no role."""

    betas: tuple[float, float] = hyper((0.9, 0.99), ge=0, lt=1)
    alpha: float = hyper(-2.97)
    name = "undeclared"

    def slots(self, param):
        return {"exp_avg_sq": zeros(param, "permute")}

    def update(self, u, s, c):
        return u * self.alpha, {"exp_avg_sq": ema(s["exp_avg_sq"], u * u, self.betas[1])}


class Unclear(Optimizer):
    def __init__(self, params, lr=0.0025, betas=(0.9, 0.99), alpha=-2.97, **options):
        super().__init__(params, {"lr": lr, "betas": betas, "alpha": alpha}, options)

    @staticmethod
    def chain(h):
        return (Undeclared(h.betas, h.alpha),)


def trained(cls, **options):
    params = parameters(SHAPES, torch.float64)
    optimizer = cls(params, compile="eager", **options)
    run(optimizer, params, gradients(6, SHAPES, torch.float64))
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "options", [{"palm": True}, {"palm": True, "beta2_scale": 0.5}, {"mars": True}, {"mars": True, "palm": True}]
)
def test_an_option_finds_a_strangers_hyperparameter_by_its_role(options):
    for ours, theirs in zip(trained(AdamW, **options), trained(Stranger, **options), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-13, atol=1e-15)
    assert not torch.equal(trained(Stranger, **options)[0], trained(Stranger)[0])


def test_a_number_of_the_same_name_and_another_role_keeps_its_value():
    one, two = trained(Stranger, palm=True, lr=0.002), trained(Stranger, palm=True, lr=0.001, alpha=2.0)
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("option", "role"), [("palm", "second_moment"), ("mars", "first_moment")])
def test_an_option_whose_role_nobody_has_is_refused_by_name(option, role):
    with pytest.raises(OptionError, match=rf"{option}=True .*role='{role}'"):
        Unclear(parameters(SHAPES), **{option: True})


def test_a_rule_with_a_decay_of_its_own_gets_no_second_one():
    params = parameters(SHAPES)
    before = [p.detach().clone() for p in params]
    optimizer = Stranger(params, shrink=0.1, weight_decay=0.5, compile="eager")
    run(optimizer, params, [[torch.zeros_like(p) for p in params]])
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b * (1 - 0.0025 * 0.1))


@dataclass(frozen=True)
class OldDecay(Transform):
    """As written for API 1.2: the name says it."""

    weight_decay: float = hyper(0.0, ge=0)
    name = "old_decay"

    def update(self, u, s, c):
        return u + self.weight_decay * c.param, {}


def test_a_field_called_weight_decay_has_its_role_without_saying_so():
    assert list(roles.values((OldDecay(0.3),), "weight_decay")) == [0.3]


def test_roles_are_found_and_replaced_inside_forks_branches_and_inner_rules():
    @dataclass(frozen=True)
    class Outer(Transform):
        inner: Transform = field(default_factory=ScaleByAdam)
        name: ClassVar[str] = "outer"
        domain: ClassVar[Domain] = Domain.MATRIX

    plain = Renamed(0.1, 0.2)
    chain = (Route(is_matrix, (Outer(ScaleByAdam((0.3, 0.4))),), (Parallel(((plain,), (ScaleByAdam((0.5, 0.6)),))),)),)
    assert list(roles.values(chain, "second_moment")) == [0.4, 0.2, 0.6]
    assert list(roles.values(chain, "first_moment")) == [0.3, 0.1, 0.5]
    changed = roles.replaced(chain, "second_moment", lambda x: x / 2)
    assert list(roles.values(changed, "second_moment")) == [0.2, 0.1, 0.3]
    assert list(roles.values(changed, "first_moment")) == [0.3, 0.1, 0.5]
    assert roles.replaced((ScaleByAdam(),), "weight_decay", lambda x: x / 2)[0] == ScaleByAdam()


@pytest.mark.parametrize(
    ("default", "role"),
    [(0.9, "third_moment"), ((0.9, 0.99), "first_moment"), ((0.9, 0.99), ("first_moment",)), (0.9, ("first_moment",))],
)
def test_a_role_that_does_not_exist_or_does_not_fit_is_an_error_where_it_is_declared(default, role):
    with pytest.raises(RuleError, match="role"):
        hyper(default, role=role)


@pytest.mark.parametrize("name", hbcore.list_optimizers())
def test_palm_is_taken_by_every_optimizer_with_a_second_moment_and_by_no_other(name):
    """Slots that a change of basis permutes are second moments: declared apart from the roles, by the rules themselves."""
    cls = hbcore.get(name)
    if not issubclass(cls, Optimizer):
        pytest.skip("made of other optimizers")
    params = parameters(((4, 3),))
    chain = cls(params).core.chain.every(cls(params).param_groups[0])
    second = any(slot.basis == "permute" for t in chain for slot in t.slots(params[0]).values())
    if second:
        assert cls(parameters(((4, 3),)), palm=True).settings.palm
    else:
        with pytest.raises(OptionError, match="second_moment"):
            cls(parameters(((4, 3),)), palm=True)
