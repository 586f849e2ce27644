"""Slots that are derived from others: never saved, and computed again wherever they might not follow from what is stored."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from core.kit import normal, same
from core.rules import matrix, optimizer_with, parameter, rule, stepped
from torch.multiprocessing.reductions import StorageWeakRef

from hbcore.api import Optimizer, Parallel, Route, ScaleByAdam, Slot, is_matrix, zeros
from hbcore.checkpoint.export import export
from hbcore.errors import RuleError
from hbcore.introspect import describe
from hbcore.testing import check

SHAPES = [(5, 4)] * 4 + [(4, 3)] * 2
BF16 = torch.bfloat16


def square(q):
    return q.mT @ q


def factors(dtype, cached, derived=None):
    def slots(self, param):
        n = param.shape[-1]
        own = {"q": Slot(torch.Size((n, n)), 0.1, exact=True, dtype=dtype), "m": zeros(param)}
        return {**own, "p": Slot(torch.Size((n, n)), derived=True, dtype=derived)} if cached else own

    return slots


def fitted(s, c, cached, grow):
    q = s["q"] * 0.75 + grow
    return {"q": q, "p": square(q)} if cached else {"q": q}


def preconditioner(cached=True, dtype=None, own_refresh=False, told=None, stored=None, **attributes):
    """Multiplies by ``q^T q``, and fits ``q`` every other step; the product is a slot if it is ``cached``."""

    def update(self, u, s, c):
        p = s["p"] if cached else square(s["q"])
        new = fitted(s, c, cached, u.mT @ u * self.beta) if c.refresh and not own_refresh else {}
        return u @ p, {"m": s["m"] + u, **new}

    def refresh(self, stacks):
        return (fitted(s, c, cached, s["m"].mT @ s["m"] * self.beta) for s, c in stacks)

    def derive(self, s, c):
        if told is not None:
            told.append((int(c.step), len(s["q"])))
        return {"p": square(s["q"])}

    own: dict[str, Any] = {"rate": lambda self, k: 0.5, **attributes}
    own.update({"refresh": refresh} if own_refresh else {}, **({"derive": derive} if cached else {}))
    return matrix(update, factors(dtype, cached, stored), **own)


def trainer(cached=True, groups=(slice(None),), betas=(0.01, 0.02), told=None, options=(), **how):
    made = preconditioner(cached, told=told, **how)
    named = [(f"p{i}", torch.nn.Parameter(normal(*shape, seed=i).float())) for i, shape in enumerate(SHAPES)]
    given = [{"params": named[some], "beta": beta} for some, beta in zip(groups, betas, strict=False)]
    cls = optimizer_with(lambda h: (made(h.beta),))
    return cls(given, lr=0.1, compile="eager", **dict(options)), [p for _, p in named]


def train(optimizer, params, steps, without=()):
    for k in steps:
        for i, p in enumerate(params):
            p.grad = None if i in without else normal(*p.shape, seed=100 * k + i).float()
        optimizer.step()


def numbers(optimizer, params):
    return [t for p in params for t in (p.detach().clone(), optimizer.state[p]["q"].clone(), optimizer.state[p]["m"].clone())]


def look(optimizer, params):
    assert all(set(optimizer.state[p]) == {"q", "m", "step"} for p in params)


def write_in_place(optimizer, params):
    for p in params:
        optimizer.state[p]["q"].mul_(0.5)


def write_to_one(optimizer, params):
    optimizer.state[params[1]]["q"].mul_(0.5)


def replace(optimizer, params):
    for p in params[1:4]:
        optimizer.state[p]["q"] = optimizer.state[p]["q"] * 0.5


def swap(optimizer, params):
    optimizer.state[params[0]]["q"].data = optimizer.state[params[0]]["q"] * 0.5


def start_afresh(optimizer, params):
    del optimizer.state[params[2]]


def absent(optimizer, params):
    train(optimizer, params, [90, 91, 92], without={0, 2, 5})


def write_to_absent(optimizer, params):
    train(optimizer, params, [90], without={0, 2, 5})
    write_in_place(optimizer, params)
    train(optimizer, params, [91, 92], without={1, 4})


def reload(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_another(optimizer, params):
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["q"] = entry["q"] * 0.5
    optimizer.load_state_dict(saved)


def set_state(optimizer, params):
    optimizer.__setstate__(
        copy.deepcopy({"state": {p: dict(s) for p, s in optimizer.state.items()}}, {id(p): p for p in params})
    )


def add_a_group(optimizer, params):
    late = torch.nn.Parameter(normal(5, 4, seed=77).float())
    optimizer.add_param_group({"params": [("late", late)], "beta": 0.01})
    params.append(late)


def move_apart(optimizer, params):
    optimizer.param_groups[-1]["beta"] = 0.03


def skip(optimizer, params):
    look(optimizer, params)
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    look(optimizer, params)


DISTURBANCES = [
    look, write_in_place, write_to_one, replace, swap, start_afresh, absent, write_to_absent, reload, load_another, set_state,
    add_a_group, move_apart, skip,
]  # fmt: skip
KINDS = {
    "in update": {},
    "in refresh": {"own_refresh": True},
    "staggered": {"own_refresh": True, "staggers": True},
    "apart": {"options": {"multi_tensor": False}},
    "two groups": {"groups": (slice(0, None, 2), slice(1, None, 2))},
    "two groups alike": {"groups": (slice(0, None, 2), slice(1, None, 2)), "betas": (0.01, 0.01)},
    "skipping": {"options": {"skip_nonfinite": True}},
}


LONG = ("in refresh", "apart", "two groups alike")


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.full] * (kind in LONG)) for kind in KINDS])
@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
def test_they_always_follow_from_what_is_stored(disturb, kind):
    """A rule with a cache does what it does without, whatever happens in between."""
    if disturb is skip and kind != "skipping":
        pytest.skip("only skip_nonfinite=True stands it")
    results = []
    for cached in (True, False):
        optimizer, params = trainer(cached, **KINDS[kind])
        train(optimizer, params, range(3))
        disturb(optimizer, params)
        train(optimizer, params, range(3, 5))
        disturb(optimizer, params)
        train(optimizer, params, range(5, 8))
        results.append(numbers(optimizer, params))
    assert same(*results)
    assert all(t.isfinite().all() for t in results[0])


def test_a_write_to_a_tensor_that_was_handed_out_long_ago_is_noticed():
    results = []
    for cached in (True, False):
        optimizer, params = trainer(cached)
        train(optimizer, params, range(2))
        held = [optimizer.state[p]["q"] for p in params]
        for k in range(2, 8):
            train(optimizer, params, [k])
            held[k % len(held)].mul_(0.5)
        train(optimizer, params, [9])
        results.append(numbers(optimizer, params))
    assert same(*results)


def test_they_are_computed_when_they_are_not_known_and_only_then():
    told: list[Any] = []
    optimizer, params = trainer(told=told)
    train(optimizer, params, range(4))
    assert told == [(1, 4), (1, 2)]
    told.clear()
    held = optimizer.state[params[0]]["q"]
    train(optimizer, params, range(4, 7))
    assert told == [(5, 4), (5, 2)]
    told.clear()
    held.mul_(2)
    train(optimizer, params, range(7, 9))
    assert told == [(8, 4)]
    told.clear()
    train(optimizer, params, range(9, 12), without={0, 4, 5})
    train(optimizer, params, range(12, 14))
    assert told == []


@pytest.mark.parametrize("kind", ["in update", "in refresh", "staggered"])
@pytest.mark.parametrize("dtype", [{}, {"dtype": BF16}, {"dtype": torch.float16}, {"stored": BF16}], ids=str)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_training_goes_on_bit_for_bit(stop, dtype, kind):
    straight, first, resumed = (trainer(**dtype, **KINDS[kind]) for _ in range(3))
    train(*straight, range(7))
    train(*first, range(stop))
    resumed[0].load_state_dict(through_file(first[0].state_dict()))
    with torch.no_grad():
        for p, q in zip(resumed[1], first[1], strict=True):
            p.copy_(q)
    train(*resumed, range(stop, 7))
    assert same(numbers(*resumed), numbers(*straight))


def through_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_copies_derive_them_anew():
    optimizer, params = trainer()
    train(optimizer, params, range(3))
    copied, theirs = copy.deepcopy((optimizer, params))
    train(optimizer, params, range(3, 7))
    train(copied, theirs, range(3, 7))
    assert same(numbers(copied, theirs), numbers(optimizer, params))


def test_checkpoints_have_none_and_are_the_same_without_them():
    (cached, params), (plain, others) = trainer(True), trainer(False)
    assert cached.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    for optimizer, its_own in ((cached, params), (plain, others)):
        train(optimizer, its_own, range(3))
    ours, theirs = cached.state_dict(), plain.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for i, entry in ours["state"].items():
        assert entry.keys() == theirs["state"][i].keys() and same(entry.values(), theirs["state"][i].values())
    assert {name for entry in export(cached)["state"].values() for name in entry} == {"q", "m", "step"}
    cached.load_state_dict(copy.deepcopy(theirs))
    plain.load_state_dict(copy.deepcopy(ours))
    train(cached, params, range(3, 6))
    train(plain, others, range(3, 6))
    assert same(numbers(cached, params), numbers(plain, others))


def test_their_memory_is_free_while_the_state_is_lent(monkeypatch):
    optimizer, params = trainer()
    train(optimizer, params, range(2))
    stacks = {stack for m in optimizer.core.plan.members.values() for view in m.views for _, stack, _ in view.runs}
    held = [StorageWeakRef(stack.stored["p"].untyped_storage()) for stack in stacks]
    assert len(held) == 2
    assert optimizer.state
    assert all(storage.expired() for storage in held)


def test_a_rule_that_primes_has_them_and_they_follow_from_what_it_primed():
    def prime(self, u, s, c):
        assert torch.equal(s["p"], square(s["q"]))
        return {"q": u.mT @ u}

    (cached, params), (plain, others) = (
        trainer(cached, primes=True, prime=prime if cached else lambda self, u, s, c: {"q": u.mT @ u})
        for cached in (True, False)
    )
    train(cached, params, range(4))
    train(plain, others, range(4))
    assert same(numbers(cached, params), numbers(plain, others))


def test_a_branch_may_have_them():
    def in_parallel(cached):
        made = preconditioner(cached)
        cls = optimizer_with(lambda h: (Parallel(((ScaleByAdam((0.9, 0.99), 1e-8),), (made(h.beta),))),))
        params = [torch.nn.Parameter(normal(*shape, seed=i).float()) for i, shape in enumerate(SHAPES)]
        optimizer = cls(params, lr=0.1, compile="eager")
        train(optimizer, params, range(3))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(optimizer, params, range(3, 6))
        return [p.detach() for p in params]

    assert same(in_parallel(True), in_parallel(False))


def test_they_take_memory_and_that_is_described():
    made = preconditioner()
    cls = optimizer_with(lambda h: (made(h.beta),))
    found = {slot["name"]: (slot["bytes_per_parameter"], slot["derived"]) for slot in describe(cls)["slots"]}
    assert found == {"q": (4.0, False), "m": (4.0, False), "p": (4.0, True)}
    assert describe(cls)["bytes_per_parameter"] == 12


def narrow(p):
    return is_matrix(p) and p.numel() // len(p) < 100


class Tiny(Optimizer):
    """A third party's optimizer, whose factors are stored in bfloat16 and whose products are derived from them."""

    lr: float = 0.01
    beta: float = 0.01

    @staticmethod
    def chain(h: Any) -> Any:
        return (Route(narrow, (ToyRule(h.beta),)),)


ToyRule = preconditioner(dtype=BF16)


@pytest.mark.broad  # the whole kit once more
def test_an_optimizer_with_them_conforms():
    assert check(Tiny) == []


def derived(method, update=lambda self, u, s, c: (u, {}), **attributes):
    own = {"derive": method} if method else {}
    return matrix(update, lambda self, p: {"q": zeros(p), "p": Slot(p.shape, derived=True)}, **own, **attributes)


def declared(slot, make=matrix, **attributes):
    return make(slots=lambda self, p: {"m": zeros(p), "p": slot(p)}, derive=lambda self, s, c: {}, **attributes)


DECLARED = {
    "no method": (derived(None), "'p' is derived, and the rule does not define derive"),
    "an elementwise rule": (
        declared(lambda p: Slot(p.shape, derived=True), rule),
        "'p' has derived=True, which is for rules of",
    ),
    "a fill": (declared(lambda p: Slot(p.shape, 1.0, derived=True)), r"'p' is derived and has fill 1\.0"),
}
MISTAKES = {
    "nothing": (lambda self, s, c: None, r"returned None for its slots"),
    "too few": (lambda self, s, c: {}, r"returned no value for the slot 'p'"),
    "another slot": (lambda self, s, c: {"p": s["q"], "q": s["q"]}, r"returned 'q', which is not one of its slots \['p'\]"),
    "a wrong shape": (
        lambda self, s, c: {"p": s["q"][0]},
        r"returned shape \(4, 3\) for the slot 'p', whose shape is \(2, 4, 3\)",
    ),
    "a float": (lambda self, s, c: {"p": 1.0}, r"returned a float for the slot 'p'"),
    "itself": (lambda self, s, c: {"p": s["p"] + 1}, r"reads 'p', which is not one of its slots \['q'\]"),
    "the parameter": (lambda self, s, c: {"p": s["q"] + c.param}, r"reads c\.param, which only update can"),
    "a draw": (lambda self, s, c: {"p": c.noise(s["q"])}, r"calls c\.noise, which derive cannot"),
    "a normal draw": (lambda self, s, c: {"p": c.probe(s["q"])}, r"calls c\.probe, which derive cannot"),
    "an inner rule": (lambda self, s, c: {"p": c.apply(None, s["q"], s)[0]}, r"calls c\.apply, which only update can"),
    "an exception": (lambda self, s, c: exec("raise ValueError('odd')"), r"raised ValueError: odd"),
}


@pytest.mark.parametrize("what", DECLARED)
def test_a_declaration_that_cannot_be_is_an_error(what):
    made, words = DECLARED[what]
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'toy' .ToyRule.slots.: the slot {words}"):
        stepped(made, parameter(4, 3))


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_names_the_rule_and_its_method(what):
    method, words = MISTAKES[what]
    params = [parameter(4, 3), parameter(4, 3)]
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'toy' .ToyRule.derive.*{words}"):
        stepped(derived(method, needs=frozenset({"param"})), *params)
    assert same(params, [torch.ones(4, 3)] * 2)


def test_it_may_not_write_to_what_it_is_given():
    made = derived(lambda self, s, c: {"p": s["q"].add_(1)})
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'toy' .ToyRule. writes to a tensor that it was given"):
        stepped(made, parameter(4, 3))


def test_the_name_is_the_protocols():
    with pytest.raises(RuleError, match="'derive' is a method of every rule"):
        matrix(__annotations__={"derive": int}, derive=2)
