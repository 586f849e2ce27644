"""A rule or a chain that cannot work is refused when its class is made or the optimizer built, by name and with a remedy."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from core.rules import matrix, moment, optimizer_with, parameter, rule, stepped

import hbcore.api
from hbcore.api import Block, Domain, Parallel, Route, Slot, Transform, hyper, is_matrix, zeros
from hbcore.errors import RuleError

ATTRIBUTES = {
    "a domain in text": (lambda: rule(domain="tensor"), r"domain = 'tensor'.*Domain\.TENSOR"),
    "a domain as a number": (lambda: rule(domain=1), r"domain = 1.*Domain\.TENSOR"),
    "no such stage": (lambda: rule(stage="nowhere"), "stage = 'nowhere'.*'clip_update'"),
    "a stage of the wrong kind": (lambda: rule(stage=3), "stage = 3"),
    "needs that do not exist": (lambda: rule(needs=frozenset({"state"})), "needs = .*state"),
    "needs as a text": (lambda: rule(needs="param"), "needs = 'param'"),
    "a name that is no text": (lambda: rule(name=None), "name = None"),
    "a version that is no number": (lambda: rule(version="2"), "version = '2'"),
    "the parameter, before weight decay": (lambda: rule(owns_apply=True), "owns_apply.*stage = 'apply'"),
}
METHODS = {
    **{
        f"a field called {name}": (
            lambda name=name: rule(**{"__annotations__": {"beta": float, name: float}, name: hyper(0.1)}),
            f"'{name}' is a method",
        )
        for name in ("rate", "slots", "update", "blocks", "swap", "hypers")
    },
    "a value called rate": (lambda: rule(rate=0.5), "'rate' is a method"),
}


@pytest.mark.parametrize("case", METHODS)
def test_a_field_named_like_a_method_is_refused_when_the_class_is_made(case):
    make, words = METHODS[case]
    with pytest.raises(RuleError, match=f"ToyRule.*{words}"):
        make()


@pytest.mark.parametrize("case", ATTRIBUTES)
def test_an_attribute_that_cannot_work_is_refused_when_an_optimizer_is_built(case):
    make, words = ATTRIBUTES[case]
    with pytest.raises(RuleError, match=f"ToyRule.*{words}"):
        optimizer_with(lambda h: (make()(),))([parameter(2)])


def test_a_class_may_have_a_stage_that_is_computed_and_methods_of_its_own():
    class Base(Transform):
        """Without a name, a dataclass or an update: what rules have in common."""

        domain = Domain.TENSOR

    @dataclass(frozen=True)
    class Computed(Base):
        at: str = "apply"
        name = "computed"
        owns_apply = True
        update = Proper.update

        @property
        def stage(self):
            return self.at

    optimizer_with(lambda h: (Computed(),))([parameter(2)])
    with pytest.raises(RuleError, match=r"Computed.*stage = 'apply'"):
        optimizer_with(lambda h: (Computed("rule"),))([parameter(2)])


class Bare(Transform):
    beta: float = hyper(0.5)
    name = "bare"


@dataclass(frozen=True)
class Proper(Transform):
    beta: float = hyper(0.5)
    name = "proper"

    def update(self, u, s, c):
        return u, {}


class Forgetful(Proper):
    gamma: float = hyper(0.5)


ok = rule()
CHAINS = {
    "one rule": (lambda h: ok(h.beta), r"returned a ToyRule; .*\(rule,\)"),
    "nothing": (lambda h: None, "returned None"),
    "a generator": (lambda h: (r for r in [ok(h.beta)]), "returned a generator"),
    "a class": (lambda h: (ok,), r"class ToyRule.*ToyRule\(\.\.\.\)"),
    "a function": (lambda h: (ok(h.beta), lambda u, s, c: (u, {})), "a function"),
    "None among rules": (lambda h: (ok(h.beta), None), "None is in the chain"),
    "a rule in a list in the chain": (lambda h: ([ok(h.beta)],), "a list is in the chain"),
    "no name": (lambda h: (rule(name="")(h.beta),), "ToyRule.*has no name"),
    "a blank name": (lambda h: (rule(name=" ")(h.beta),), "ToyRule.*has no name"),
    "no dataclass": (lambda h: (Bare(h.beta),), r"Bare.*@dataclass\(frozen=True\)"),
    "no dataclass, without arguments": (lambda h: (Bare(),), r"Bare.*@dataclass\(frozen=True\)"),
    "a subclass that is no dataclass": (lambda h: (Forgetful(h.beta),), r"Forgetful.*@dataclass\(frozen=True\)"),
    "a branch that is one rule": (lambda h: (Route(is_matrix, ok(h.beta), ()),), r"a branch of Route is a ToyRule.*\(rule,\)"),
    "a class in a branch": (lambda h: (Route(is_matrix, (ok,)),), "class ToyRule is in a branch of Route"),
    "a rule without a name in a branch": (lambda h: (Route(is_matrix, (), (rule(name="")(h.beta),)),), "has no name"),
    "a branch of Parallel that is one rule": (lambda h: (Parallel((ok(h.beta), ())),), "branch of Parallel is a ToyRule"),
    "a class in a branch of Parallel": (lambda h: (Parallel(((ok,), ())),), "class ToyRule is in a branch of Parallel"),
    "a condition that is none": (lambda h: (Route(True, (ok(h.beta),)),), "condition of a Route is True.*is_matrix"),
    "no update": (lambda h: (rule(Transform.update)(h.beta),), r"'toy' .ToyRule.*does not define update\(u, s, c\)"),
    "no update of matrices": (lambda h: (matrix(Transform.update)(h.beta),), r"does not define update\(u, s, c\)"),
    "priming by elements": (lambda h: (rule(primes=True)(h.beta),), "primes = True.*Domain.MATRIX"),
    "priming undefined": (lambda h: (matrix(primes=True)(h.beta),), r"primes = True.*prime\(u, s, c\)"),
    "a rate above 1": (lambda h: (matrix(rate=lambda self, k: 2)(h.beta),), r"'toy'.*rate\) returned 2.*\[0, 1\]"),
    "no rate": (lambda h: (matrix(rate=lambda self, k: None)(h.beta),), r"rate\) returned None"),
    "an entry that does not exist": (lambda h: (ok(h.betta),), "h.betta does not exist.*beta.*lr"),
}


@pytest.mark.parametrize("case", CHAINS)
def test_a_chain_that_is_no_chain_is_refused_when_the_optimizer_is_built(case):
    chain, words = CHAINS[case]
    with pytest.raises((RuleError, AttributeError), match=words) as caught:
        optimizer_with(chain)([parameter(3, 2)])
    if not {"branch", "dataclass", "condition", "update", "priming"} & {*case.replace(",", "").split()}:
        assert f"{__file__}:" in str(caught.value)


def test_a_chain_may_be_a_list():
    listed, tuples = (optimizer_with(lambda h, kind=kind: kind([ok(h.beta)]))([parameter(2)]) for kind in (list, tuple))
    assert listed.param_groups[0]["hbcore"] == tuples.param_groups[0]["hbcore"]


def named(name, shape=None):
    return lambda self, p: {name: Slot(p.shape if shape is None else torch.Size(shape))}


SLOTS = {
    "a list": (rule(slots=lambda self, p: ["m"]), "returned a list.*zeros"),
    "None": (rule(slots=lambda self, p: None), "returned None"),
    "tensors": (rule(slots=lambda self, p: {"m": torch.zeros_like(p)}), "'m' is a .*Tensor.*zeros"),
    "another shape": (rule(slots=named("m", (3,))), r"'m' has shape \(3,\) for a parameter of shape \(3, 2\)"),
    "a number's shape": (rule(slots=named("m", ()), domain=Domain.TENSOR), r"'m' has shape \(\)"),
    "a shape that is none": (rule(slots=lambda self, p: {"m": Slot(p)}), "'m' has a Parameter for a shape.*torch.Size"),
    "a fill that is no number": (rule(slots=lambda self, p: {"m": Slot(p.shape, "x")}), "'m' has fill 'x'"),
    "no such basis": (rule(slots=lambda self, p: {"m": zeros(p, "turn")}), "'m' has basis 'turn'.*'rotate'"),
    "names that follow the shape": (rule(slots=lambda self, p: {f"m{p.ndim}": zeros(p)}), "'m2'.*'m1'.*use a Route"),
    "a matrix rule's list": (matrix(slots=lambda self, p: ["m"]), "returned a list"),
    "blocks that are not all": (matrix(blocks=lambda self, shape: (Block(0, 1, (2, 2)),)), r"blocks\) cuts shape \(3, 2\)"),
    "blocks that overlap": (matrix(blocks=lambda self, shape: (Block(0, 1, (3, 1)), Block(0, 1, (3, 1)))), r"blocks\) cuts"),
    "blocks that are none": (matrix(blocks=lambda self, shape: shape), "blocks.* returned a Size|returned a tuple"),
    "no blocks": (rule(domain=Domain.MATRIX), r"Domain\.MATRIX.*blocks\(shape\)"),
    **{
        f"the engine's name {name!r}": (kind(slots=named(name)), f"'{name}'.*param, grad, update, step")
        for name in ("param", "grad", "update", "step", "numel", "noise.m", "stack.update", "carried.m")
        for kind in (rule, matrix)
    },
    **{
        f"no name: {name!r}": (kind(slots=named(name)), f"'{name}' is not the name of a slot.*letters")
        for name in ("", "m#ecc", "m@0", "a b", "0", "m-1", "m:")
        for kind in (rule, matrix)
    },
    "a name that is no text": (rule(slots=named(0)), "0 is not the name"),
    "scalars in a list": (rule(scalars=lambda self: ["w"]), "scalars.* returned a list.*dict of numbers"),
    "no scalars": (matrix(scalars=lambda self: None), "scalars.* returned None"),
    "scalars in text": (rule(scalars=lambda self: {"w": "x"}), r"scalars.* returned the values \['x'\]"),
    "a scalar's name": (rule(scalars=lambda self: {"my w": 1.0}), "'my w' is not the name of a scalar"),
}


@pytest.mark.parametrize("case", SLOTS)
def test_slots_that_cannot_be_kept_are_refused_when_the_optimizer_is_built(case):
    made, words = SLOTS[case]
    with pytest.raises(RuleError, match=f"'toy' .ToyRule.*({words})"):
        optimizer_with(lambda h: (made(h.beta),))([parameter(3, 2), parameter(3)])


@pytest.mark.parametrize("make", [rule, matrix], ids=["elementwise", "matrix"])
def test_slots_are_asked_with_the_shape_that_the_documentation_promises(make):
    asked = []

    def slots(self, param):
        asked.append(tuple(param.shape))
        return moment(self, param)

    made = make(slots=slots)
    [p] = params = [parameter(4, 3, 2)]
    optimizer = optimizer_with(lambda h: (made(h.beta),))(params, ecc="bf16+8")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    loaded = optimizer_with(lambda h: (made(h.beta),))(params, ecc="bf16+8")
    loaded.load_state_dict(optimizer.state_dict())
    assert {*asked} == {(4, 3, 2) if make is rule else (4, 6)}


@pytest.mark.parametrize("name", ["my rule", "1", "a-b", "ä.b", "x\ny"])
def test_a_rule_may_be_called_anything(name):
    made = rule(lambda self, u, s, c: (u / c.norm(u), {"m": s["m"]}), name=name, domain=Domain.TENSOR)
    optimizer = stepped(made, parameter(3), compile="triton")
    assert (optimizer.report.backend, optimizer.report.reasons) == ("triton", [])


def test_two_rules_may_not_have_one_slot_of_a_block():
    with pytest.raises(RuleError, match="both claim the slot 'm'"):
        optimizer_with(lambda h: (ok(h.beta), matrix()(h.beta)))([parameter(3, 2)])
    with pytest.raises(RuleError, match="both claim the slot 'm'"):
        optimizer_with(lambda h: (rule(scalars=lambda self: {"m": 1.0})(h.beta),))([parameter(3)])


def test_the_stages_of_the_api_are_those_of_the_engine():
    from hbcore.rules.stages import ORDER

    assert hbcore.api.STAGES == ORDER
    assert {hbcore.api.StateCodec, hbcore.api.Migration, hbcore.api.DecayWeights}
