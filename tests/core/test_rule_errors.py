"""What a rule returns, reads or writes against the protocol is an error that names the rule, its line and what to do."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from core.kit import same
from core.rules import matrix, optimizer_with, parameter, rule, stepped

from hbcore.api import Parallel, graft
from hbcore.engine.graph.purity import Purity
from hbcore.errors import FallbackWarning, RuleError


def moved(change):
    """A rule that does ``change(u, s, c)`` and nothing else."""

    def update(self, u, s, c):
        change(u, s, c)
        return u, {"m": s["m"]}

    return update


def momentum_in_place(self, u, s, c):
    m = s["m"].mul_(self.beta).add_(u)
    return m, {"m": m}


WRITES = {
    "the update": moved(lambda u, s, c: u.mul_(2)),
    "a slot": momentum_in_place,
    "the parameter": moved(lambda u, s, c: c.param.add_(1)),
    "the gradient": moved(lambda u, s, c: c.grad.zero_()),
    "out": moved(lambda u, s, c: torch.add(u, 1, out=u)),
    "an item": moved(lambda u, s, c: u.__setitem__(..., 0)),
    "a view": moved(lambda u, s, c: s["m"].view(-1).add_(1)),
    "detached": moved(lambda u, s, c: c.param.detach().mul_(2)),
    "by data": moved(lambda u, s, c: c.grad.data.mul_(2)),
    "several at once": moved(lambda u, s, c: torch._foreach_add_([u, s["m"]], 1)),
    "the step": moved(lambda u, s, c: c.step.add_(1)),
    "a hyperparameter": lambda self, u, s, c: (u * self.beta.mul_(2), {"m": s["m"]}),
}
NEEDS = frozenset({"param", "grad"})


def unfusable(update):
    """The same, in a rule that tracing gives up on first."""

    def wrapped(self, u, s, c):
        math.sqrt(self.beta)
        return update(self, u, s, c)

    return wrapped


KINDS = {
    "traced": (rule, {}),
    "not traced": (lambda update: rule(unfusable(update)), {}),
    "matrix": (lambda update: matrix(update, needs=NEEDS), {}),
    "matrix, packed state": (lambda update: matrix(update, needs=NEEDS), {"ecc": "bf16+8"}),
}


@pytest.mark.filterwarnings("ignore::hbcore.errors.FallbackWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", WRITES)
def test_a_rule_that_writes_to_what_it_is_given_is_stopped_before_it_does(what, kind):
    make, options = KINDS[kind]
    p = parameter(4, 3)
    before, p.grad = p.detach().clone(), torch.ones_like(p)
    optimizer = optimizer_with(lambda h: (make(WRITES[what])(h.beta),))([p], **options)
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: .*'toy' .ToyRule.* writes to .*out-of-place"):
        optimizer.step()
    assert same([p, p.grad], [before, torch.ones_like(p)])
    assert "m" not in optimizer.state[p] or not optimizer.state[p]["m"].any()


@pytest.mark.parametrize("kind", ["not traced", "matrix"])
def test_a_rule_may_write_to_tensors_of_its_own(kind):
    def update(self, u, s, c):
        m = s["m"].clone().mul_(self.beta).add_(u)
        out = torch.empty_like(u)
        torch.mul(m, 2, out=out)
        out[..., 0] = 1
        return out, {"m": m}

    make, _ = KINDS[kind]
    p = parameter(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        optimizer = stepped(make(update), p, lr=1.0)
    assert torch.equal(optimizer.state[p]["m"].view(4, 3), torch.full((4, 3), 1.5))


def test_a_rule_may_not_write_to_what_the_rule_before_it_returned():
    first, second = rule(lambda self, u, s, c: (u * 2, {}), lambda self, p: {}), rule(WRITES["the update"])
    optimizer = optimizer_with(lambda h: (first(h.beta), second(h.beta)))([p := parameter(3)])
    p.grad = torch.ones(3)
    with pytest.raises(RuleError, match="writes to"):
        optimizer.step()


def test_priming_may_not_write_either():
    optimizer = optimizer_with(lambda h: (matrix(primes=True, prime=lambda self, u, s, c: {"m": u.mul_(2)})(h.beta),))
    [p] = params = [parameter(3, 2)]
    p.grad = torch.ones_like(p)
    with pytest.raises(RuleError, match=r"'toy'.*writes to"):
        optimizer(params).step()


RETURNS = {
    "only the update": (lambda self, u, s, c: u, r"returned a Tensor; return the update and a dict"),
    "nothing": (lambda self, u, s, c: None, r"returned None"),
    "three": (lambda self, u, s, c: (u, {}, {}), r"returned a tuple of 3"),
    "a list of two": (lambda self, u, s, c: [u, {"m": u}], r"returned a list"),
    "slots in a list": (lambda self, u, s, c: (u, [s["m"]]), r"returned a list for its slots"),
    "no update": (lambda self, u, s, c: (None, {"m": u}), r"returned None for an update"),
    "an unknown slot": (lambda self, u, s, c: (u, {"m": s["m"], "zzz": u}), r"returned 'zzz'.*\['m'\]"),
    "a number for a slot": (lambda self, u, s, c: (u, {"m": 0.0}), r"returned a float for the slot 'm'"),
    "one number for a slot": (lambda self, u, s, c: (u, {"m": c.step}), r"shape \(\) for the slot 'm'"),
    "a wider slot": (lambda self, u, s, c: (u, {"m": s["m"].unsqueeze(0)}), r"for the slot 'm', whose shape"),
    "one number": (lambda self, u, s, c: (c.step, {"m": s["m"]}), r"an update of shape \(\).*keeps its shape"),
    "a wider update": (lambda self, u, s, c: (u.unsqueeze(0), {"m": s["m"]}), r"an update of shape \(1, .*keeps its shape"),
    "a complex update": (lambda self, u, s, c: (u * 1j, {"m": s["m"]}), r"returned a complex update"),
    "a complex slot": (lambda self, u, s, c: (u, {"m": u * 1j}), r"returned a complex value for the slot 'm'"),
    "another slot's name": (lambda self, u, s, c: (u * s["mm"], {"m": s["m"]}), r"reads 'mm'.*\['m'\]"),
}


@pytest.mark.filterwarnings("ignore::hbcore.errors.FallbackWarning")
@pytest.mark.parametrize("make", [rule, lambda update: rule(unfusable(update)), matrix], ids=["traced", "not traced", "matrix"])
@pytest.mark.parametrize("what", RETURNS)
def test_what_a_rule_returns_is_looked_at_where_it_returns(what, make):
    update, words = RETURNS[what]
    p = parameter(4, 3)
    before = p.detach().clone()
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'toy' .ToyRule.* {words}"):
        stepped(make(update), p)
    assert torch.equal(p, before)


def remembering(self, u, s, c):
    self.last = u
    return u, {"m": s["m"]}


MISTAKES = {
    "an attribute of its own": (remembering, r"'last'; a rule keeps nothing from step to step: declare a slot"),
    "a typo": (lambda self, u, s, c: (u.squared(), {"m": s["m"]}), r"raised AttributeError: .*'squared'"),
    "a missing key": (lambda self, u, s, c: ({}["scale"] * u, {"m": s["m"]}), r"raised KeyError: 'scale'"),
    "shapes that do not fit": (lambda self, u, s, c: (u + u.new_ones(17), {"m": s["m"]}), r"raised \w+Error: "),
    "its own complaint": (lambda self, u, s, c: exec("raise ValueError('beta is odd')"), r"raised ValueError: beta is odd"),
}


@pytest.mark.filterwarnings("ignore::hbcore.errors.FallbackWarning")
@pytest.mark.parametrize("make", [rule, lambda update: rule(unfusable(update)), matrix], ids=["traced", "not traced", "matrix"])
@pytest.mark.parametrize("what", MISTAKES)
def test_whatever_a_rule_raises_names_the_rule(what, make):
    update, words = MISTAKES[what]
    p = parameter(4, 3)
    before = p.detach().clone()
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'toy' .ToyRule.update.*{words}") as caught:
        stepped(make(update), p)
    assert caught.value.__cause__ is not None
    assert torch.equal(p, before)


def test_an_inner_rule_and_a_priming_are_named_too():
    inner = rule(lambda self, u, s, c: u.squared(), name="inner")
    with pytest.raises(RuleError, match=r"rule 'inner'.* raised AttributeError"):
        stepped(matrix(lambda self, u, s, c: c.apply(inner(0.5), u, s)), parameter(4, 3))
    with pytest.raises(RuleError, match=r"rule 'toy' .ToyRule.prime.* raised AttributeError"):
        stepped(matrix(primes=True, prime=lambda self, u, s, c: u.squared()), parameter(4, 3))


def test_a_device_without_memory_is_no_fault_of_the_rule():
    def update(self, u, s, c):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        stepped(matrix(update), parameter(4, 3))


def test_elementwise_rules_return_every_slot_and_matrix_rules_need_not():
    with pytest.raises(RuleError, match=r"'toy'.*no value for the slot 'm'.*s\['m'\]"):
        stepped(rule(lambda self, u, s, c: (u, {})), parameter(3))
    stepped(matrix(lambda self, u, s, c: (u, {})), parameter(3, 2))


def test_a_branch_of_parallel_that_returns_no_pair_is_named():
    broken = rule(lambda self, u, s, c: u)
    optimizer = optimizer_with(lambda h: (Parallel(((broken(h.beta),), ()), merge=graft),))([p := parameter(3)])
    p.grad = torch.ones(3)
    with pytest.raises(RuleError, match=r"'toy' .ToyRule.*returned a Tensor"):
        optimizer.step()


MATRICES = {
    "flat": (matrix(lambda self, u, s, c: (u.sum(-1), {})), r"an update of shape \(1, 4\) where it was given \(1, 4, 3\)"),
    "one block's slot": (matrix(lambda self, u, s, c: (u, {"m": s["m"][0]})), r"shape \(4, 3\) for the slot 'm'"),
    "too few stacks": (matrix(update_stacks=lambda self, stacks: []), r"update_stacks.* returned 0 results for 1 stacks"),
    "too many stacks": (matrix(update_stacks=lambda self, stacks: [(stacks[0][0], {})] * 2), "returned more results for 1"),
    "no stacks": (matrix(update_stacks=lambda self, stacks: None), "returned None; return a result for each"),
    "no dict of a priming": (matrix(primes=True, prime=lambda self, u, s, c: u), "prime.* returned a Tensor for its slots"),
    "an undeclared parameter": (matrix(lambda self, u, s, c: (u + c.param, {})), r"reads c\.param.*needs = .*'param'"),
    "the other way round": (matrix(lambda self, u, s, c: (c.param + u, {})), r"reads c\.param"),
    "with a number": (matrix(lambda self, u, s, c: (2 * c.param + u, {})), r"reads c\.param"),
    "by a method": (matrix(lambda self, u, s, c: (c.grad.norm() * u, {})), r"reads c\.grad.*'grad'"),
    "by a function": (matrix(lambda self, u, s, c: (torch.where(c.grad > 0, u, 0), {})), r"reads c\.grad"),
    "in a function": (matrix(lambda self, u, s, c: (torch.maximum(u, c.grad), {})), r"reads c\.grad"),
    "beside what is declared": (matrix(lambda self, u, s, c: (u + c.grad, {}), needs=frozenset({"param"})), "'grad', 'param'"),
    "a clamp to a number": (matrix(lambda self, u, s, c: (u.clamp(min=self.beta), {})), r"clamps to a number.*fails on a GPU"),
    "a clamp to a zero": (matrix(lambda self, u, s, c: (u.clamp(max=self.beta * 0), {})), r"clamps to a number.*on a GPU"),
    "a dtype in text": (matrix(working_dtype=lambda self, p: "bfloat16"), r"working_dtype.* returned 'bfloat16'"),
    "a dtype of whole numbers": (matrix(working_dtype=lambda self, p: torch.int32), r"working_dtype.* returned torch.int32"),
    "an inner rule": (
        matrix(lambda self, u, s, c: c.apply(rule(lambda self, u, s, c: u)(0.5), u, s)), "returned a Tensor; return the update",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MATRICES)
def test_matrix_rules_are_looked_at_in_their_first_run(what):
    made, words = MATRICES[what]
    with pytest.raises(RuleError, match=f"'toy' .ToyRule.*{words}"):
        stepped(made, parameter(4, 3))


def test_what_only_matrix_rules_have_is_refused_by_name():
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'toy'.*c\.apply.*Domain\.MATRIX"):
        stepped(rule(lambda self, u, s, c: c.apply(self, u, s)), parameter(3))


@pytest.mark.parametrize("call", ["probe", "noise"])
def test_random_numbers_that_are_not_declared_are_refused_by_name(call):
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'toy'.*declare `draws = 1`"):
        stepped(rule(lambda self, u, s, c: (u + getattr(c, call)(u), {"m": s["m"]})), parameter(3))


def reading_a_constant(self, u, s, c):
    return u * torch.arange(1, 4), {"m": s["m"]}


def drawing(self, u, s, c):
    return u + torch.randn_like(u), {"m": s["m"]}


@pytest.mark.filterwarnings("ignore::hbcore.errors.FallbackWarning")
@pytest.mark.parametrize("kind", ["not traced", "matrix"])
def test_only_the_first_run_is_watched(kind, monkeypatch):
    make, _ = KINDS[kind]
    optimizer = stepped(make(lambda self, u, s, c: (u, {"m": s["m"]})), p := parameter(4, 3), steps=1)
    monkeypatch.setattr(Purity, "__enter__", lambda self: pytest.fail("a steady step is watched"))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 2


UNFUSABLE = {
    "a sum": (lambda self, u, s, c: (u / u.sum(), {"m": s["m"]}), "reduces"),
    "c.sum": (lambda self, u, s, c: (u / c.sum(u), {"m": s["m"]}), "Domain.TENSOR"),
    "a branch": (lambda self, u, s, c: (u if self.beta > 0 else -u, {"m": s["m"]}), "Python number"),
    "order": (lambda self, u, s, c: (u.sort()[0], {"m": s["m"]}), "not elementwise"),
    "a constant": (reading_a_constant, "outside the rule|not elementwise"),
    "random numbers": (drawing, "global generator"),
}


@pytest.mark.parametrize("what", UNFUSABLE)
def test_a_rule_that_cannot_be_fused_is_named_and_promises_no_results(what):
    update, words = UNFUSABLE[what]
    with pytest.warns(FallbackWarning, match=rf"{__file__}:\d+: rule 'toy' .ToyRule.*({words})") as caught:
        stepped(rule(update), parameter(3))
    assert "same results" not in str(caught[0].message)
    assert "not supported on sharded parameters" in str(caught[0].message)
