"""SOAP's rule against its float64 oracle, and what the oracle cannot tell."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from core.kit import distance, normal
from core.plain import plain
from reference.adamw import adamw
from reference.soap import soap

import hbcore
from hb_soap import SOAP, PreconditionBySOAP
from hbcore.api import ScaleByAdam, bases
from hbcore.engine.shared_options import OPTIONS
from hbcore.errors import HyperparameterError, OptionError
from hbcore.rules.products import IEEE
from hbcore.rules.transform import no_memory
from hbcore.rules.views import Block

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 18
HYPERS = {"lr": 0.05, "betas": (0.9, 0.95), "shampoo_beta": 0.9, "eps": 1e-8}
STRUCTURE = {n: p.default for n, p in inspect.signature(PreconditionBySOAP).parameters.items()} | {"merge_dims": False}
STRUCTURE = {n: default for n, default in STRUCTURE.items() if n in inspect.signature(SOAP).parameters and n not in HYPERS}

# A side may exceed the rank of the first gradient by one: the missing eigenvector is unique then, and free otherwise.
CASES = {
    "every-step": ((5, 5), {"precondition_frequency": 1}),
    "every-other": ((5, 5), {}),
    "every-tenth": ((5, 5), {"precondition_frequency": 10}),
    "schedule": ((5, 5), {"use_precond_schedule": True, "precond_scheduler": (2, 3)}),
    "wide": ((5, 6), {}),
    "tall": ((6, 5), {"precondition_frequency": 1}),
    "merged-matrix": ((1, 2), {"merge_dims": True}),
    "conv": ((7, 2, 2, 2), {}),
    "conv-merged": ((7, 2, 2, 2), {"merge_dims": True, "max_precond_dim": 8}),
    "three": ((3, 4, 2), {"precondition_frequency": 1}),
    "one-wide": ((2, 1), {}),
    "too-wide": ((4, 12), {"max_precond_dim": 8}),
    "too-tall": ((12, 4), {"max_precond_dim": 8, "precondition_frequency": 1}),
    "too-large": ((12, 9), {"max_precond_dim": 8}),
    "vector": ((2,), {}),
    "vector-preconditioned": ((2,), {"precondition_1d": True}),
    "scalar": ((), {"precondition_1d": True}),
}


def stream(shape, steps=STEPS, dtype=torch.float64):
    """Gradients whose dominant direction changes half-way, so that columns have to be sorted anew."""
    grads = normal(steps, *shape, seed=2) * 2.0 ** (torch.arange(steps) % 5 - 2).reshape(-1, *[1] * len(shape))
    for i, n in enumerate(shape):
        weights = torch.linspace(0.2, 2.0, n, dtype=torch.float64).reshape([-1 if d == i else 1 for d in range(len(shape))])
        grads = torch.cat([grads[: steps // 2] * weights, grads[steps // 2 :] * weights.flip(i)])
    return list(grads.to(dtype))


def ours(param, grads, *, structure=None, **hypers):
    options = {**STRUCTURE, **(structure or {})}
    return plain(lambda h: SOAP.chain(SimpleNamespace(**vars(h), **options)), {**HYPERS, **hypers}, param, grads)


def wanted(param, grads, *, structure=None, **hypers):
    options = {**STRUCTURE, **(structure or {})}
    scheduler, scheduled = options.pop("precond_scheduler"), options.pop("use_precond_schedule")
    for ours_alone in ("split", "stagger", "solver"):
        options.pop(ours_alone)
    settings = {**HYPERS, **options, "schedule": scheduler if scheduled else None, **hypers}
    return torch.tensor(soap(param.double().numpy(), [g.double().numpy() for g in grads], **settings))


def slots(state):
    """The slots of the parameter's only block."""
    return state["soap", 0]


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name):
    shape, structure = CASES[name]
    start, grads = normal(*shape, seed=1), stream(shape)
    expected = wanted(start, grads, structure=structure)
    param, _ = ours(start, grads, structure=structure)
    assert distance([param - start], [expected - start]) < 1e-9


CHANGED = {"betas": (0.5, 0.999), "shampoo_beta": 0.0, "eps": 0.5, "weight_decay": 0.3, "warmup_steps": 5}


@pytest.mark.parametrize("name", CHANGED)
def test_hyperparameters_agree_with_the_oracle(name):
    hypers = {name: CHANGED[name]}
    start, grads = normal(5, 5, seed=1), stream((5, 5))
    expected = wanted(start, grads, **hypers)
    assert distance([ours(start, grads, **hypers)[0] - start], [expected - start]) < 1e-9
    assert distance([wanted(start, grads) - start], [expected - start]) > 1e-4


def test_no_shampoo_beta_means_the_second_beta():
    start, grads = normal(5, 5, seed=1), stream((5, 5))
    unset, same = (ours(start, grads, betas=(0.9, 0.7), shampoo_beta=beta)[0] for beta in (None, 0.7))
    assert torch.equal(unset, same)


def test_float32_follows_float64():
    start, grads = normal(5, 5, seed=1), stream((5, 5))
    param, state = ours(start.float(), [g.float() for g in grads])
    assert {t.dtype for t in slots(state).values()} == {torch.float32}
    assert distance([param - start], [wanted(start, grads) - start]) < 1e-4


def test_signs_of_basis_vectors_do_not_matter(monkeypatch):
    start, grads = normal(5, 6, seed=1), stream((5, 6))
    expected, _ = ours(start, grads)
    coins = torch.Generator().manual_seed(5)

    def flipped(q):
        return q * (2 * torch.randint(2, (q.shape[0], 1, q.shape[-1]), generator=coins) - 1)

    eigenbasis, refreshed = bases.eigenbasis, bases.refreshed
    monkeypatch.setattr(bases, "eigenbasis", lambda p: flipped(eigenbasis(p)))
    monkeypatch.setattr(bases, "refreshed", lambda *arguments: flipped(refreshed(*arguments)))
    assert distance([ours(start, grads)[0]], [expected]) < 1e-12


def test_the_first_gradient_prepares_and_moves_nothing():
    start, grads = normal(4, 5, seed=1), stream((4, 5))
    param, state = ours(start, grads[:1], weight_decay=0.5)
    assert torch.equal(param, start)
    kept = slots(state)
    assert torch.allclose(kept["GG_0"][0], 0.1 * grads[0] @ grads[0].T, atol=1e-14)
    assert torch.allclose(kept["GG_1"][0], 0.1 * grads[0].T @ grads[0], atol=1e-14)
    assert not kept["exp_avg"].any() and not kept["exp_avg_sq"].any()
    assert not torch.equal(ours(start, grads[:2])[0], start)


@pytest.mark.parametrize("shape", [(13,), (1, 1), (12, 9), ()], ids=str)
def test_what_has_no_factor_is_adam_from_the_first_step_on(shape):
    start, grads = normal(*shape, seed=1), stream(shape)
    settings = {k: v for k, v in HYPERS.items() if k != "shampoo_beta"}
    for steps in (1, STEPS):
        param, state = ours(start, grads[:steps], structure={"max_precond_dim": 8})
        assert distance([param], [torch.tensor(adamw(start.numpy(), [g.numpy() for g in grads[:steps]], **settings))]) < 1e-12
        assert "adam" in state


def test_a_refresh_turns_the_first_moment_and_leaves_the_second_with_its_columns():
    """The second column's eigenvalue has overtaken the first's: it is orthonormalized first, and stays the second."""
    rule = PreconditionBySOAP(ScaleByAdam((0.5, 0.5)), shampoo_beta=0.5)
    eye, g = torch.eye(2, dtype=torch.float64)[None], torch.tensor([[[1.0, 0.1], [0.2, 2.0]]], dtype=torch.float64)
    moments = {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
    state = {"GG_0": eye, "GG_1": eye, "Q_0": eye, "Q_1": eye, **moments}
    kept, turned = (run(rule, g, state, refresh)[1] for refresh in (False, True))
    assert torch.equal(kept["Q_0"], eye)
    assert torch.equal(turned["exp_avg_sq"], kept["exp_avg_sq"])
    second = kept["GG_0"][0, :, 1] / kept["GG_0"][0, :, 1].norm()
    assert torch.allclose((turned["Q_0"][0, :, 1] @ second).abs(), torch.ones((), dtype=torch.float64), atol=1e-12)
    back = turned["Q_0"] @ turned["exp_avg"] @ turned["Q_1"].mT
    assert torch.allclose(back, kept["exp_avg"], atol=1e-12)
    assert not torch.allclose(turned["exp_avg"], kept["exp_avg"], atol=1e-3)


def run(rule, u, s, refresh, prime=False):
    """One step of the rule on a stack, with no driver between; its update and its slots."""
    c = SimpleNamespace(step=torch.tensor(2.0, dtype=torch.float64), refresh=refresh, divide=lambda x, y, eps: x / (y + eps))
    c.into = no_memory
    c.apply, c.products = lambda inner, u, s: inner.update(u, s, c), IEEE
    if prime:
        empty = {n: u.new_zeros(len(u), *slot.shape) for n, slot in rule.slots(u[0]).items()}
        return rule.prime(u, {**empty, **s}, c)
    update, new = rule.update(u, s, c)
    new = {**s, **new}
    return update, {**new, **(next(iter(rule.refresh([(new, c)]))) if refresh else {})}


@pytest.mark.parametrize("shape", [(5, 6), (3, 2, 4)], ids=str)
def test_a_stack_equals_its_blocks_one_by_one(shape):
    rule = PreconditionBySOAP(ScaleByAdam((0.9, 0.95)), merge_dims=False)
    grads = normal(6, 3, *shape, seed=4)
    moments = {n: torch.zeros(3, *shape, dtype=torch.float64) for n in ("exp_avg", "exp_avg_sq")}

    def trained(rows):
        state = {n: m[rows] for n, m in moments.items()}
        state |= run(rule, grads[0][rows], state, True, prime=True)
        for k in range(1, 6):
            update, new = run(rule, grads[k][rows], state, k % 2 == 0)
            state |= new
        return update

    apart = torch.cat([trained(slice(i, i + 1)) for i in range(3)])
    assert torch.allclose(trained(slice(None)), apart, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 2, 2)], ids=str)
def test_zero_gradients_move_nothing_and_break_nothing(shape, dtype):
    start, zero = normal(*shape, seed=1, dtype=dtype), torch.zeros(shape, dtype=dtype)
    assert torch.equal(ours(start, [zero] * 5)[0], start)
    param, state = ours(start, [zero, *stream(shape, dtype=dtype)])
    assert all(t.isfinite().all() for t in (param, *slots(state).values()))
    assert not torch.equal(param, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_of_low_rank_stay_finite_and_bases_orthonormal(dtype):
    start = normal(16, 40, seed=1, dtype=dtype)
    grads = [(a @ b).to(dtype) for a, b in zip(normal(40, 16, 1, seed=2), normal(40, 1, 40, seed=3), strict=True)]
    grads = [*grads[:1] * 10, *grads]
    param, state = ours(start, grads, structure={"precondition_frequency": 1})
    assert param.isfinite().all()
    for i, n in enumerate(start.shape):
        q = slots(state)[f"Q_{i}"][0].double()
        assert (q.T @ q - torch.eye(n)).abs().max() < 1e-5


def test_a_gradient_that_is_not_finite_raises_nothing():
    bad = torch.full((4, 5), float("nan"), dtype=torch.float64)
    for grads in ([bad, *stream((4, 5), 4)], [*stream((4, 5), 4), bad]):
        param, _ = ours(normal(4, 5), grads)
        assert param.shape == (4, 5)


def test_slots_are_named_by_dimension_and_factors_are_exact():
    rule = PreconditionBySOAP(max_precond_dim=8, merge_dims=False)
    slots = rule.slots(torch.empty(4, 1, 9, 3))
    assert {n: (tuple(s.shape), s.exact) for n, s in slots.items()} == {
        "exp_avg": ((4, 1, 9, 3), False),
        "exp_avg_sq": ((4, 1, 9, 3), False),
        "GG_0": ((4, 4), True),
        "Q_0": ((4, 4), True),
        "GG_3": ((3, 3), True),
        "Q_3": ((3, 3), True),
    }


@pytest.mark.parametrize(
    ("merge_dims", "limit", "shape", "block"),
    [
        (False, 2048, (8, 3, 2, 2), (8, 3, 2, 2)),
        (True, 12, (8, 3, 2, 2), (8, 12)),
        (True, 2048, (768, 768), (768, 768)),
        (True, 2048, (4, 1), (4,)),
    ],
)
def test_neighbours_are_merged_while_they_fit(merge_dims, limit, shape, block):
    [found] = PreconditionBySOAP(merge_dims=merge_dims, max_precond_dim=limit).blocks(torch.Size(shape))
    assert found == Block(0, 1, block)


@pytest.mark.parametrize(("steps", "total"), [(10, 10), (100, 99), (1_000, 738), (10_000, 2_168), (100_000, 4_049)])
def test_totals_of_the_default_schedule(steps, total):
    rate = PreconditionBySOAP(use_precond_schedule=True).rate
    assert math.floor(sum(map(rate, range(1, steps + 1))) + 2**-10) == total
    assert all(0 <= rate(k) <= 1 for k in (1, 2, 10, steps))


@pytest.mark.parametrize("frequency", [1, 2, 3, 10])
def test_a_frequency_refreshes_at_its_multiples(frequency):
    rate, total, due = PreconditionBySOAP(precondition_frequency=frequency).rate, 0.0, []
    for k in range(1, 1001):
        before, total = total, total + rate(k)
        if math.floor(total + 2**-10) > math.floor(before + 2**-10):
            due.append(k)
    assert due == list(range(frequency, 1001, frequency))


def test_names_and_defaults_are_those_of_heavyball():
    defaults = {n: p.default for n, p in inspect.signature(SOAP).parameters.items()}
    wanted = {
        "lr": 0.003, "betas": (0.9, 0.95), "shampoo_beta": 0.95, "eps": 1e-8, "weight_decay": 0.01,
        "precondition_frequency": 2, "max_precond_dim": 2048, "merge_dims": True, "precondition_1d": False,
        "use_precond_schedule": False, "precond_scheduler": (1 / 3, 9), "split": False,
    }  # fmt: skip
    assert {n: defaults[n] for n in wanted} == wanted
    ours_alone = {"params", "stagger", "solver"}
    assert {n for n in defaults if n not in OPTIONS} - ours_alone == set(wanted) - {"weight_decay"}


def test_old_names_resolve():
    old = {name: hbcore.info(name) for name in ("ForeachSOAP", "PrecondScheduleForeachSOAP", "PrecondScheduleSOAP")}
    assert {info.spec.target for info in old.values()} == {"hb_soap.soap:SOAP"}
    assert [dict(info.alias.preset) for info in old.values()] == [{}, *[{"use_precond_schedule": True}] * 2]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"split": 3}, OptionError, "split=3 is neither"),
        ({"stagger": None}, OptionError, "stagger=None is neither"),
        ({"solver": "svd"}, OptionError, "solver='svd' does not exist; pass one of qr, eigh"),
        ({"covariance": "full"}, OptionError, "covariance='full' does not exist; pass one of plain, kl"),
        ({"init_factor": 0}, HyperparameterError, "init_factor=0"),
        ({"dampening": -1.0}, HyperparameterError, "dampening=-1.0"),
        ({"precondition_frequency": 2.5}, HyperparameterError, "precondition_frequency=2.5"),
        ({"merge_dims": "x"}, HyperparameterError, "merge_dims='x'"),
        ({"precond_scheduler": (1 / 3,)}, HyperparameterError, "precond_scheduler="),
        ({"precond_scheduler": None}, HyperparameterError, "precond_scheduler=None"),
        ({"precondition_frequency": 0}, HyperparameterError, "precondition_frequency=0"),
        ({"max_precond_dim": 0}, HyperparameterError, "max_precond_dim=0"),
        ({"shampoo_beta": 1.0}, HyperparameterError, "shampoo_beta=1.0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, error, words):
    with pytest.raises(error, match=words):
        PreconditionBySOAP(**fields)
