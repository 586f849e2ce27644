"""PSGDLRA against its float64 oracle, over parameters end to end, and what its options do."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from core.kit import gradients, normal, parameters, run, same, values
from reference.clipping import trust_region
from reference.psgd import refreshes
from reference.psgd_lra import psgd_lra

import hb_psgd
import hbcore
from hb_psgd import PSGDLRA
from hb_psgd.lra_rule import NOT_YET, default_rank
from hbcore.errors import HyperparameterError, OptionError
from hbcore.rules import noise, row_noise

SHAPES = ((5, 7), (13,), (2, 3, 4), (1,), ())
STEPS = 24


def drawn(call, step, shapes, rest=()):
    """The engine's numbers for the parameters end to end: those of each one's key, by an element's place.

    ``shapes`` are the parameters', by their places in the group.
    """
    numbers = []
    for i, shape in shapes.items():
        key = noise.stream_key(f"0/0.{i}/0.0", "psgd_lra")
        count = int(np.prod([*shape, *rest]))
        numbers.append(row_noise.normal(torch.tensor([key]), count, step, call).double().numpy().reshape(-1, *rest))
    return np.concatenate(numbers)


class Draws:
    """What the oracle draws, in the order in which the rule does: U, V and v at the first step, and then a v each."""

    def __init__(self, shapes, refresh=lambda t: True):
        self.shapes = shapes if isinstance(shapes, dict) else dict(enumerate(shapes))
        fits = [t for t in range(1, STEPS + 1) if refresh(t)]
        self.calls = [(1, 1), (2, 1), *((3 if t == 1 else 1, t) for t in fits)]

    def __call__(self, shape):
        return drawn(*self.calls.pop(0), self.shapes, shape[1:])


def flat(tensors):
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


def relative(ours, theirs):
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def problem(dtype, steps=STEPS):
    grads = [[g.to(dtype) for g in some] for some in gradients(steps, SHAPES, torch.float64)]
    return parameters(SHAPES, dtype), [some if t != 3 else [g + 0.01 for g in some] for t, some in enumerate(grads)]


def clip(u):
    return trust_region([u], [u])[0]


CASES = {
    "default": {},
    "rank 1": {"rank": 1},
    "delayed": {"delayed": True},
    "no momentum": {"exp_avg_input": False},
    "fitted to the gradient": {"momentum_into_precond_update": False},
    "numbers": {"beta": 0.5, "precond_lr": 0.03, "lower_bound_beta": 0.5, "dampening": 1e-3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_parameters_end_to_end_equal_the_oracle_of_one_vector(case, dtype):
    options, (params, grads) = CASES[case], problem(dtype)
    start, numel = flat(params), sum(p.numel() for p in params)
    optimizer = PSGDLRA(params, lr=0.01, preconditioner_update_probability=1, **options)
    run(optimizer, params, grads)
    expected, oracle = psgd_lra(
        start, [flat(g) for g in grads], draw=Draws(SHAPES), lr=0.01, clip=clip, **{"rank": default_rank(numel), **options}
    )
    bound = 1e-6 if dtype == torch.float64 else 1e-3
    assert relative(flat(params) - start, expected - start) < bound
    state = [optimizer.state[p] for p in params]
    assert relative(flat(s["d"] for s in state), oracle.d) < bound
    for name, theirs in (("U", oracle.u), ("V", oracle.v)):
        ours = np.concatenate([s[name].double().reshape(-1, theirs.shape[1]).numpy() for s in state])
        assert relative(ours, theirs) < bound


def test_alone_each_parameter_has_a_preconditioner_of_its_own():
    params, grads = problem(torch.float64)
    starts = values(params)
    optimizer = PSGDLRA(params, lr=0.01, preconditioner_update_probability=1, multi_tensor=False)
    run(optimizer, params, grads)
    together, _ = problem(torch.float64)
    run(PSGDLRA(together, lr=0.01, preconditioner_update_probability=1), together, grads)
    for i, (p, start) in enumerate(zip(params, starts, strict=True)):
        expected, oracle = psgd_lra(
            flat([start]), [flat([g[i]]) for g in grads], draw=Draws({i: SHAPES[i]}), lr=0.01, clip=clip,
            rank=default_rank(p.numel()),
        )  # fmt: skip
        assert relative(flat([p]), expected) < 1e-8
        assert optimizer.state[p]["U"].shape == (*p.shape, oracle.u.shape[1])
    assert not any(torch.equal(p, q) for p, q in zip(params, together, strict=True))


def test_refreshes_follow_the_schedule_and_steps_between_them_precondition():
    params, grads = problem(torch.float64)
    start = flat(params)
    due = refreshes(lambda t: 0.4, STEPS)
    optimizer = PSGDLRA(params, lr=0.01, preconditioner_update_probability=0.4)
    run(optimizer, params, grads)

    def refresh(t):
        return due[t - 1]

    expected, _ = psgd_lra(
        start, [flat(g) for g in grads], draw=Draws(SHAPES, refresh), lr=0.01, clip=clip, rank=default_rank(len(start)),
        refresh=refresh,
    )  # fmt: skip
    assert 0 < sum(due) < STEPS
    assert relative(flat(params) - start, expected - start) < 1e-8


@pytest.mark.parametrize("p", [0, 0.0])
def test_without_refreshes_the_preconditioner_stays_as_it_began(p):
    params, grads = problem(torch.float32)
    optimizer = PSGDLRA(params, preconditioner_update_probability=p)
    run(optimizer, params, grads[:1])
    before = [optimizer.state[q][name].clone() for q in params for name in ("U", "V", "d")]
    run(optimizer, params, grads[1:])
    assert same([optimizer.state[q][name] for q in params for name in ("U", "V", "d")], before)


FIRST = {
    "zero": lambda g: 0 * g,
    "1e-30": lambda g: 1e-30 * g,
    "1e18": lambda g: 1e18 * g,
    "1e25": lambda g: 1e25 * g,
    "rank 1": lambda g: torch.ones_like(g),
}


@pytest.mark.parametrize("exp_avg_input", [True, False])
@pytest.mark.parametrize("first", FIRST)
def test_training_goes_on_after_any_first_gradient(first, exp_avg_input):
    """The loss is a quadratic; momentum forgets a gradient of 1e25 in some 600 steps, which a small beta shortens."""
    params = parameters(SHAPES)
    optimizer = PSGDLRA(params, lr=0.05, beta=0.1, exp_avg_input=exp_avg_input)
    run(optimizer, params, [[FIRST[first](normal(*p.shape, seed=3).float()) for p in params]])
    assert all(p.isfinite().all() for p in params)
    before = sum(float(p.detach().square().sum()) for p in params)
    for _ in range(130):
        run(optimizer, params, [[p.detach().clone() for p in params]])
    assert all(t.isfinite().all() for p in params for t in (p, *optimizer.state[p].values()))
    assert sum(float(p.detach().square().sum()) for p in params) < 0.8 * before


def test_nothing_moves_until_the_first_gradient_that_is_not_zero():
    params = parameters(SHAPES)
    before, optimizer = values(params), PSGDLRA(params)
    run(optimizer, params, [[torch.zeros_like(p) for p in params]] * 2)
    assert same(values(params), before)


def test_the_rank_is_the_binary_logarithm_of_the_group_s_elements():
    params = parameters(((100, 10), (24,)))
    groups = [{"params": params[:1]}, {"params": params[1:]}, {"params": parameters(((7,),)), "rank": 2}]
    assert [group["rank"] for group in PSGDLRA(groups).param_groups] == [10, 5, 2]
    assert [group["rank"] for group in PSGDLRA(params).param_groups] == [10]
    assert [group["rank"] for group in PSGDLRA(params[:1], rank=3).param_groups] == [3]
    assert [group["rank"] for group in PSGDLRA([("a", params[0]), ("b", params[1])]).param_groups] == [10]
    late = PSGDLRA(params)
    late.add_param_group({"params": iter(parameters(((70,),)))})
    assert late.param_groups[1]["rank"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 75}, r"rank=75 is more than the 74 elements"),
        ({"beta": 1.0}, "beta"),
        ({"precond_lr": 1.5}, "precond_lr"),
        ({"dampening": -1.0}, "dampening"),
        ({"eps": -1.0}, "eps"),
        ({"preconditioner_update_probability": 2}, "preconditioner_update_probability"),
        ({"precond_init_scale": 0.0}, "precond_init_scale"),
    ],
)
def test_bad_values_are_errors_that_name_the_option(options, message):
    with pytest.raises((HyperparameterError, OptionError), match=message):
        PSGDLRA(parameters(SHAPES), **options)


@pytest.mark.parametrize("option", NOT_YET)
def test_what_is_not_supported_yet_is_refused_by_name(option):
    with pytest.raises(OptionError, match=f"{option}=.* is not supported"):
        PSGDLRA(parameters(SHAPES), **{option: "something"})


def test_no_beta_is_the_default():
    assert PSGDLRA(parameters(SHAPES), beta=None).param_groups[0]["beta"] == 0.9


@pytest.mark.parametrize(
    ("name", "delayed"), [("ForeachPSGDLRA", False), ("ForeachDelayedPSGDLRA", True), ("DelayedPSGDLRA", True)]
)
def test_heavyball_s_names_are_known(name, delayed):
    with pytest.warns(Warning, match="PSGDLRA"):
        optimizer = hbcore.get(name)(parameters(SHAPES))
    assert optimizer.param_groups[0]["delayed"] == delayed


def test_every_option_is_documented():
    assert inspect.getdoc(PSGDLRA) is not None
    for option in inspect.signature(PSGDLRA).parameters:
        if option not in ("params", "options") and option in PSGDLRA.own:
            assert option in inspect.getdoc(PSGDLRA)
    assert hb_psgd.PSGDLRA is PSGDLRA


@pytest.mark.parametrize("exp_avg_input", [True, False])
def test_what_show_says_is_what_the_state_takes(exp_avg_input):
    from hbcore import introspect

    facts = introspect.describe(PSGDLRA, rank=10, exp_avg_input=exp_avg_input)
    assert facts["bytes_per_parameter"] == pytest.approx(8 * 10 + 4 + 4 * exp_avg_input, abs=0.02)
    params = parameters(((32, 32),))
    optimizer = PSGDLRA(params, rank=10, exp_avg_input=exp_avg_input)
    run(optimizer, params, [[torch.ones(32, 32)]])
    taken = sum(t.numel() * t.element_size() for name, t in optimizer.state[params[0]].items() if name != "step")
    assert taken / 1024 == facts["bytes_per_parameter"]


def test_a_step_of_zeros_fits_nothing():
    params, grads = problem(torch.float32)
    optimizer = PSGDLRA(params, exp_avg_input=False)
    run(optimizer, params, grads[:2])
    before = [optimizer.state[q][name].clone() for q in params for name in ("U", "V", "d", "bounds")]
    run(optimizer, params, [[torch.zeros_like(p) for p in params]])
    assert same([optimizer.state[q][name] for q in params for name in ("U", "V", "d", "bounds")], before)


@pytest.mark.parametrize("differences", [False, True], ids=["exact", "differences"])
def test_the_newton_form_becomes_the_inverse_hessian(differences):
    """Of a quadratic of two parameters, whose Hessian is a diagonal and a matrix of rank 2, which couples them."""
    a = normal(17, 2, seed=1)
    hessian, eye = torch.diag(torch.linspace(1, 4, 17, dtype=torch.float64)) + a @ a.mT, torch.eye(17, dtype=torch.float64)
    params = [torch.nn.Parameter(normal(*shape, seed=seed)) for seed, shape in ((2, (4, 3)), (3, (5,)))]
    optimizer = hbcore.create(
        "NewtonPSGDLRA", params, rank=3, lr=0.0, finite_differences=differences, precond_lr=0.5,
        preconditioner_update_probability=1,
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        x = torch.cat([p.flatten() for p in params])
        loss = x @ hessian @ x / 2
        loss.backward()
        return loss

    def error():
        u, v, d = (torch.cat([optimizer.state[p][name].reshape(p.numel(), -1) for p in params]) for name in ("U", "V", "d"))
        q = (eye + u @ v.mT) * d.mT
        return float((q.mT @ q @ hessian - eye).norm() / 17**0.5)

    optimizer.step(closure)
    assert error() > 0.5
    for _ in range(750):
        optimizer.step(closure)
    assert error() < 0.05


def test_newton_names_and_values():
    for name, interval in (("ForeachNewtonPSGDLRA", 1), ("NewtonPSGDLRA", 1), ("NewtonHybrid2PSGDLRA", 2)):
        group = hbcore.create(name, parameters(SHAPES)).param_groups[0]
        assert (group["hessian_approx"], group["hvp_interval"]) == (True, interval)
    with pytest.raises(HyperparameterError, match="hvp_interval=0 is not a whole number from 1 on"):
        PSGDLRA(parameters(SHAPES), hvp_interval=0)
    with pytest.raises(OptionError, match="finite_differences='no' is neither True nor False"):
        PSGDLRA(parameters(SHAPES), finite_differences="no")
