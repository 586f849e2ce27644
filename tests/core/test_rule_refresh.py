"""A matrix rule's own ``refresh``: when it is called, for which rows, with what state, and what becomes of its results."""

from __future__ import annotations

import copy
import weakref
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from core.kit import same
from core.rules import matrix, optimizer_with, parameter, stepped

from hbcore.api import Slot, zeros
from hbcore.errors import RuleError

NONE = Slot(torch.Size(), exact=True)


def slots(self, param):
    return {"m": zeros(param), "last": NONE, "count": NONE}


def adding(self, u, s, c):
    """Adds the gradient to ``m``."""
    return u, {"m": s["m"] + u}


def counting(self, stacks):
    """Takes down the step, counts, and halves ``m``."""
    return [{"last": s["last"] * 0 + c.step, "count": s["count"] + 1, "m": s["m"] / 2} for s, c in stacks]


def due(rate, steps):
    """The steps at which the sum of rates passes a whole number, in fractions."""
    sums = [Fraction(0), *accumulate(Fraction(rate(k)).limit_denominator(1000) for k in range(1, steps + 1))]
    return [k for k in range(1, steps + 1) if sums[k] // 1 > sums[k - 1] // 1]


RATES = {
    "always": lambda k: 1.0,
    "never": lambda k: 0.0,
    "every third": lambda k: 1 / 3,
    "three of ten": lambda k: 0.3,
    "every tenth": lambda k: 0.1,
    "more and more seldom": lambda k: 1 / k,
}


@pytest.mark.parametrize("lazy", [False, True], ids=["list", "generator"])
@pytest.mark.parametrize("name", RATES)
def test_it_is_called_when_it_is_due_after_every_update_and_with_what_they_left(name, lazy):
    heard = []

    def update(self, u, s, c):
        heard.append((int(c.step), "update", tuple(u.shape), bool(c.refresh)))
        return adding(self, u, s, c)

    def refresh(self, stacks):
        for s, c in stacks:
            heard.append((int(c.step), "refresh", tuple(s["m"].shape), s["m"].sum().item()))
            if lazy:
                yield from counting(self, [(s, c)])

    made = matrix(update, slots, rate=lambda self, k: RATES[name](k), refresh=refresh if lazy else told(refresh))
    params = [parameter(4, 3), parameter(5, 2), parameter(4, 3)]
    optimizer = stepped(made, *params, steps=24, compile="eager")
    wanted, m = [], 0.0
    for k in range(1, 25):
        refreshes, m = k in due(RATES[name], 24), m + 1
        wanted += [(k, "update", shape, refreshes) for shape in ((2, 4, 3), (1, 5, 2))]
        if refreshes:
            wanted += [(k, "refresh", shape, pytest.approx(m * torch.Size(shape).numel())) for shape in ((2, 4, 3), (1, 5, 2))]
            m /= 2
    assert heard == wanted
    for p in params:
        state, steps = optimizer.state[p], due(RATES[name], 24)
        assert (int(state["last"]), int(state["count"])) == ((steps or [0])[-1], len(steps))
        assert torch.allclose(state["m"], torch.full_like(p, m))


def told(generator):
    """``counting``, told of by a generator that yields nothing."""

    def refresh(self, stacks):
        assert list(generator(self, stacks)) == []
        return counting(self, stacks)

    return refresh


def lazily(each):
    """A refresh that does ``each(s, c)`` only when a result is asked for."""
    return lambda self, stacks: (each(s, c) for s, c in stacks)


def carrying(self, u, s, c):
    return u, {"m": s["m"], "total": s["total"] + 1}


MISTAKES = {
    "a slot that there is not": (lazily(lambda s, c: {"zzz": s["m"]}), r"returned 'zzz', which is not one of its slots"),
    "a wrong shape": (lazily(lambda s, c: {"m": s["m"][0]}), r"returned shape \(4, 3\) for the slot 'm'"),
    "one number": (lazily(lambda s, c: {"last": c.step}), r"returned shape \(\) for the slot 'last'"),
    "a float": (lazily(lambda s, c: {"m": 0.0}), r"returned a float for the slot 'm'"),
    "complex": (lazily(lambda s, c: {"m": s["m"] * 1j}), r"returned a complex value for the slot 'm'"),
    "slots in a list": (lazily(lambda s, c: [s["m"]]), r"returned a list for its slots"),
    "the slots of one stack": (lambda self, stacks: {"m": stacks[0][0]["m"]}, r"returned a str for its slots"),
    "nothing": (lambda self, stacks: None, r"returned None; return a result for each stack"),
    "too few": (lambda self, stacks: counting(self, stacks)[:1], r"returned 1 results for 2 stacks; return one for each"),
    "too many": (lambda self, stacks: counting(self, stacks) * 2, r"returned more results for 2 stacks"),
    "an exception": (lambda self, stacks: stacks[0].m, r"raised AttributeError: .*'m'"),
    "a late exception": (lazily(lambda s, c: exec("raise ValueError('odd')")), r"raised ValueError: odd"),
    "a slot that it reads": (lazily(lambda s, c: {"m": s["zzz"]}), r"reads 'zzz', which is not one of its slots"),
    "the parameter": (lazily(lambda s, c: {"m": s["m"] + c.param}), r"reads c\.param, which only update can"),
    "the gradient": (lazily(lambda s, c: {"m": c.grad * 2}), r"reads c\.grad, which only update can"),
    "an inner rule": (lazily(lambda s, c: c.apply(None, s["m"], s)[1]), r"calls c\.apply, which only update can"),
    "what a group carries": (lazily(lambda s, c: {"total": s["count"]}), r"returned 'total', which is not one of its slots"),
    "reading that": (lazily(lambda s, c: {"count": s["total"]}), r"reads 'total', which is not one of its slots"),
}
WRITES = {
    "a slot": lazily(lambda s, c: {"m": s["m"].mul_(2)}),
    "at once": lambda self, stacks: [{"m": s["m"].add_(1)} for s, _ in stacks],
    "an item": lazily(lambda s, c: {"m": s["m"].__setitem__(0, 1.0)}),
    "the step": lazily(lambda s, c: {"last": c.step.add_(1)}),
}


def failing(refresh, words):
    made = matrix(carrying, slots, refresh=refresh, needs=frozenset({"param"}), scalars=lambda self: {"total": 0.0})
    params = [parameter(4, 3), parameter(5, 2)]
    with pytest.raises(RuleError, match=words):
        stepped(made, *params)
    assert same(params, [torch.ones(4, 3), torch.ones(5, 2)])


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_names_the_rule_and_its_refresh(what):
    refresh, words = MISTAKES[what]
    failing(refresh, rf"{__file__}:\d+: rule 'toy' .ToyRule.refresh.* {words}")


@pytest.mark.parametrize("what", WRITES)
def test_it_may_not_write_to_what_it_is_given(what):
    failing(WRITES[what], rf"{__file__}:\d+: rule 'toy' .ToyRule. writes to a tensor that it was given.*out-of-place")


def test_what_it_is_called_is_the_protocols():
    with pytest.raises(RuleError, match=r"'refresh' is a method of every rule"):
        matrix(__annotations__={"refresh": int}, refresh=2)
    with pytest.raises(RuleError, match=r"staggers = 'yes' is not supported; staggers is True or False"):
        stepped(matrix(adding, slots, refresh=counting, staggers="yes"), parameter(4, 3))


SHAPES = [(4, 3)] * 8 + [(5, 2)] * 3 + [(2, 2)] * 2


def made(rate=1 / 3, staggers=False):
    return matrix(adding, slots, rate=lambda self, k: rate, refresh=counting, staggers=staggers)


def trainer(rate=1 / 3, staggers=False, groups=1, **options):
    """An optimizer of the rule, over parameters of the shapes above; every other one in another group if there are two."""
    named = [(f"p{i}", parameter(*shape)) for i, shape in enumerate(SHAPES)]
    rule = made(rate, staggers)
    given = [{"params": named[g::groups], "beta": 0.1 * g} for g in range(groups)]
    optimizer = optimizer_with(lambda h: (rule(h.beta),))(given, compile="eager", **options)
    return optimizer, [p for _, p in named]


def train(optimizer, params, steps, without=()):
    """After each step, which parameters were refreshed in it."""
    for k in steps:
        before = [int(optimizer.state[p]["count"]) if optimizer.state[p] else 0 for p in params]
        for i, p in enumerate(params):
            p.grad = None if i in without else torch.full_like(p, float((7 * i + k) % 5 - 2))
        optimizer.step()
        yield [i for i, p in enumerate(params) if optimizer.state[p] and int(optimizer.state[p]["count"]) > before[i]]


def kept(optimizer, params):
    return [t for p in params for t in (p.detach(), *(optimizer.state[p][n] for n in ("m", "last", "count")))]


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_staggered_rows_have_their_turns_one_after_the_other(interval):
    optimizer, params = trainer(1 / interval, True)
    seen = list(train(optimizer, params, range(4 * interval)))
    for start in range(0, len(seen), interval):
        assert sorted(i for step in seen[start : start + interval] for i in step) == list(range(len(params)))
    assert seen[:interval] * 4 == seen
    assert sum(map(bool, seen[:interval])) == interval


@pytest.mark.parametrize("staggers", [False, True], ids=["together", "staggered"])
@pytest.mark.parametrize("rate", [0.3, 1 / 4])
@pytest.mark.parametrize("how", [{"multi_tensor": False}, {"groups": 2}, {"groups": 2, "multi_tensor": False}], ids=str)
def test_a_row_has_its_turn_whatever_stack_it_lies_in(how, rate, staggers):
    usual, other = trainer(rate, staggers), trainer(rate, staggers, **how)
    assert list(train(*usual, range(12))) == list(train(*other, range(12)))
    assert same(kept(*usual), kept(*other))


@pytest.mark.parametrize("staggers", [False, True], ids=["together", "staggered"])
@pytest.mark.parametrize("stop", range(1, 6))
def test_a_resumed_training_goes_on_at_any_phase(stop, staggers):
    straight = trainer(1 / 5, staggers)
    expected = list(train(*straight, range(12)))
    first, resumed = trainer(1 / 5, staggers), trainer(1 / 5, staggers)
    list(train(*first, range(stop)))
    resumed[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
    with torch.no_grad():
        for p, q in zip(resumed[1], first[1], strict=True):
            p.copy_(q)
    assert list(train(*resumed, range(stop, 12))) == expected[stop:]
    assert same(kept(*resumed), kept(*straight))


@pytest.mark.parametrize("staggers", [False, True], ids=["together", "staggered"])
def test_rows_without_a_gradient_are_not_refreshed_and_the_others_are(staggers):
    usual = list(train(*trainer(1 / 3, staggers), range(9)))
    optimizer, params = trainer(1 / 3, staggers)
    seen = list(train(optimizer, params, range(3)))
    before = kept(optimizer, params[1:3])
    seen += train(optimizer, params, range(3, 6), without={1, 2})
    assert same(kept(optimizer, params[1:3]), before)
    seen += train(optimizer, params, range(6, 9))
    assert seen == [[i for i in step if not 3 <= k < 6 or i not in (1, 2)] for k, step in enumerate(usual)]


def test_groups_that_share_stacks_may_be_due_in_different_steps():
    optimizer, params = trainer(1 / 2, groups=2)
    optimizer.param_groups[1]["beta"] = optimizer.param_groups[0]["beta"]
    seen = list(train(optimizer, params, range(1), without={*range(1, len(params))}))  # the first group is ahead of the other
    seen += train(optimizer, params, range(1, 5))
    even, odd = list(range(0, len(params), 2)), list(range(1, len(params), 2))
    assert seen == [[], even, odd, even, odd]


@pytest.mark.parametrize("staggers", [False, True], ids=["together", "staggered"])
@pytest.mark.parametrize("bad", [(0,), (2,), (1, 2), (3,), (0, 4, 5)], ids=str)
def test_a_step_that_is_skipped_refreshes_nothing(bad, staggers):
    straight = trainer(1 / 3, staggers, skip_nonfinite=True)
    expected = list(train(*straight, range(8)))
    optimizer, params = trainer(1 / 3, staggers, skip_nonfinite=True)
    seen = []
    for k in range(8 + len(bad)):
        if k in bad:
            for p in params:
                p.grad = torch.full_like(p, 1.0 if p is not params[4] else torch.inf)
            optimizer.step()
        else:
            seen += train(optimizer, params, [k - sum(b < k for b in bad)])
    assert optimizer.report.skipped == len(bad)
    assert seen == expected
    assert same(kept(optimizer, params), kept(*straight))
    assert optimizer.state_dict()["param_groups"] == straight[0].state_dict()["param_groups"]


def named(own, rate, **attributes):
    """A rule whose slot has its name, which counts there."""
    return matrix(
        lambda self, u, s, c: (u, {}), lambda self, param: {own: NONE}, name=own, rate=lambda self, k: rate,
        refresh=lambda self, stacks: [{own: s[own] + c.step} for s, c in stacks], **attributes,
    )  # fmt: skip


def test_two_rules_of_one_chain_have_their_own_turns():
    first, second = named("first", 1 / 2), named("second", 1 / 3)
    params = [parameter(4, 3), parameter(4, 3), parameter(5, 2)]
    optimizer = optimizer_with(lambda h: (first(h.beta), second(h.beta)))(params, compile="eager")
    for _ in range(7):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all((optimizer.state[p]["first"], optimizer.state[p]["second"]) == (2 + 4 + 6, 3 + 6) for p in params)


@pytest.mark.parametrize("how", [{"staggers": True}, {"multi_tensor": False}, {"draws": 3}], ids=str)
def test_it_draws_numbers_of_its_own_the_same_however_it_is_called(how):
    def drawing(draws=1, staggers=False, **options):
        rule = matrix(
            lambda self, u, s, c: (u, {"m": torch.stack([c.noise(u) for _ in range(draws)])[0]}),
            lambda self, param: {"m": zeros(param), "own": zeros(param)},
            refresh=lambda self, stacks: [{"own": c.noise(s["m"])} for s, c in stacks], staggers=staggers,
        )  # fmt: skip
        params = [parameter(4, 3), parameter(4, 3)]
        optimizer = stepped(rule, *params, compile="eager", **options)
        return [optimizer.state[p][n] for p in params for n in ("m", "own")]

    usual = drawing()
    assert len({float(t.sum()) for t in usual}) == 4
    assert same(drawing(**how), usual)


def test_a_result_is_let_go_of_before_the_next_one_is_computed():
    """Three stacks' results at once would take memory that the model needs. In a first step a rule is watched."""
    alive, most = [], {}

    def made(what, like, c):
        if c.step > 1:
            most[what] = max(most.get(what, 0), sum(ref() is not None for ref in alive))
        new = torch.ones_like(like)
        alive[:] = [*(ref for ref in alive if ref() is not None), weakref.ref(new)]
        return new

    def update_stacks(self, stacks):
        for u, s, c in stacks:
            yield u, {"m": made("update", s["m"], c)}

    def refresh(self, stacks):
        for s, c in stacks:
            yield {"m": made("refresh", s["m"], c)}

    generators = matrix(update_stacks=update_stacks, refresh=refresh, rate=lambda self, k: 1.0)
    stepped(generators, parameter(2, 3), parameter(3, 4), parameter(4, 5), steps=3)
    assert most == {"update": 0, "refresh": 0}


@pytest.mark.parametrize("method", ["update_stacks", "refresh"])
@pytest.mark.parametrize(("count", "found"), [(1, "1"), (3, "more")])
def test_results_are_counted_in_later_steps_too(method, count, found):
    """A rule is watched in its first run; what it returns is looked at less closely after that, but never paired wrongly."""

    def update_stacks(self, stacks):
        results = [(u, {"m": s["m"]}) for u, s, _ in stacks]
        return (results * 2)[:count] if method == "update_stacks" and stacks[0][2].step > 1 else results

    def refresh(self, stacks):
        results = [{"m": s["m"]} for s, _ in stacks]
        return (results * 2)[:count] if method == "refresh" and stacks[0][1].step > 1 else results

    made = matrix(update_stacks=update_stacks, refresh=refresh, rate=lambda self, k: 1.0)
    stepped(made, parameter(2, 3), parameter(3, 4), steps=1)
    with pytest.raises(RuleError, match=rf"{method}\) returned {found} results for 2 stacks"):
        stepped(made, parameter(2, 3), parameter(3, 4), steps=2)
