"""PSGDKron's rule against its float64 oracle, through the plain driver."""

from __future__ import annotations

import pytest
import torch
from psgd.family import expected, factors_of, probes, problem, relative, train
from reference.clipping import trust_region

from hb_psgd import QSGD, PSGDKron
from hb_psgd.factor_rules import RULES
from hb_psgd.rule import PreconditionByKron
from hbcore.api import Context
from hbcore.rules.clipping import TrustRegionClip

# shape, our options, which factors are dense, the oracle's spelling of the options
SHAPES = {
    "square": ((7, 7), {}, (True, True)),
    "wide": ((4, 9), {}, (True, True)),
    "tall": ((11, 3), {}, (True, True)),
    "tall-one_diag": ((11, 3), {"memory_save_mode": "one_diag"}, (False, True)),
    "square-one_diag": ((5, 5), {"memory_save_mode": "one_diag"}, (True, False)),
    "square-smart_one_diag": ((5, 5), {"memory_save_mode": "smart_one_diag"}, (True, True)),
    "wide-smart_one_diag": ((4, 9), {"memory_save_mode": "smart_one_diag"}, (True, False)),
    "wide-one_triu": ((4, 9), {"memory_save_mode": "one_triu"}, (True, False)),
    "tall-all_diag": ((11, 3), {"memory_save_mode": "all_diag"}, (False, False)),
    "large": ((11, 3), {"max_size_triangular": 10}, (False, True)),
    "min-ndim": ((11, 3), {"min_ndim_triangular": 3}, (False, False)),
    "convolution": ((4, 3, 2, 2), {}, (True,) * 4),
    "convolution-one_triu": ((4, 3, 2, 2), {"memory_save_mode": "one_triu"}, (False, False, True, False)),
    "pointwise-convolution": ((6, 4, 1, 1), {}, (True, True)),
    "token": ((1, 1, 13), {}, (False,)),
    "vector": ((13,), {}, (False,)),
    "dense-vector": ((5,), {"min_ndim_triangular": 1}, (True,)),
    "one": ((1,), {}, (False,)),
    "scalar": ((), {}, (False,)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_rule_agrees_with_its_oracle_for_every_shape(name):
    shape, options, dense = SHAPES[name]
    param, gradients = problem(shape)
    ours, state = train(param, gradients, **options)
    theirs, factors = expected(param, gradients, dense=dense)
    assert relative(ours, theirs) < 1e-9
    for q, reference in zip(factors_of(state), factors, strict=True):
        assert q.shape == reference.shape
        assert relative(q, reference) < 1e-9
    assert ours.shape == param.shape


@pytest.mark.parametrize("name", ["square", "wide-one_triu", "convolution", "vector", "one"])
def test_float32_stays_near_the_oracle(name):
    shape, options, dense = SHAPES[name]
    param, gradients = problem(shape, torch.float32)
    ours, state = train(param, gradients, **options)
    theirs, _ = expected(param, gradients, dense=dense)
    assert {slot.dtype for slot in state["psgd_kron", 0].values()} == {torch.float32}
    assert relative(ours, theirs) < 1e-6


# ours, the oracle's where the spelling differs
OPTIONS = {
    "betas": ({"beta": 0.6}, {}),
    "no-momentum-weight": ({"beta": 0.0}, {}),
    "gradient-into-factors": ({"momentum_into_precond_update": False}, {}),
    "pure": ({"exp_avg_input": False}, {}),
    "pure-gradient-into-factors": ({"exp_avg_input": False, "momentum_into_precond_update": False}, {}),
    "delayed": ({"delayed": True}, {}),
    "delayed-pure": ({"delayed": True, "exp_avg_input": False}, {}),
    "factors": ({"precond_lr": 0.7, "lower_bound_beta": 0.5}, {}),
    "dampening": ({"dampening": 0.05}, {}),
    "more-iterations": ({"precond_update_power_iterations": 5}, {"half_iters": 5}),
    "init": ({"precond_init_scale": 0.3}, {"init_scale": 0.3}),
    "init-scale": ({"precond_init_scale_scale": 3.0}, {"init_scale_scale": 3.0}),
    "init-power": (
        {"precond_init_scale_scale": 3.0, "precond_init_scale_power": 0.5},
        {"init_scale_scale": 3.0, "init_scale_power": 0.5},
    ),
    "probability": ({"preconditioner_update_probability": 0.3}, {"probability": lambda k: 0.3}),
    "never": ({"preconditioner_update_probability": 0}, {"probability": lambda k: 0.0}),
    "accumulated": ({"precond_grad_accum": True}, {"accumulate": True}),
    "accumulated-sometimes": (
        {"precond_grad_accum": True, "preconditioner_update_probability": 0.4},
        {"accumulate": True, "probability": lambda k: 0.4},
    ),
    "accumulated-gradients": (
        {"precond_grad_accum": True, "preconditioner_update_probability": 0.4, "momentum_into_precond_update": False},
        {"accumulate": True, "probability": lambda k: 0.4},
    ),
    "not-cached": ({"cached": False}, {}),
    "not-cached-delayed": (
        {"cached": False, "delayed": True, "preconditioner_update_probability": 0.4},
        {"probability": lambda k: 0.4},
    ),
    "delayed-sometimes": ({"preconditioner_update_probability": 0.5, "delayed": True}, {"probability": lambda k: 0.5}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(6, 4), (9,)], ids=str)
def test_every_option_agrees_with_the_oracle(name, shape):
    options, spelled = OPTIONS[name]
    dense = (True, True) if len(shape) == 2 else (False,)
    names = {"beta", "precond_lr", "lower_bound_beta", "dampening", "delayed", "exp_avg_input", "momentum_into_precond_update"}
    param, gradients = problem(shape)
    ours, state = train(param, gradients, **options)
    theirs, factors = expected(
        param, gradients, dense=dense,
        **{k: v for k, v in options.items() if k in names}, **spelled,
    )  # fmt: skip
    assert relative(ours, theirs) < 1e-9
    for q, reference in zip(factors_of(state), factors, strict=True):
        assert relative(q, reference) < 1e-9


@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 5), (9,)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_way_to_fit_agrees_with_the_oracle_over_forty_steps(rule, shape):
    param, gradients = problem(shape, steps=40)
    for options, spelled in (({}, {}), ({"preconditioner_update_probability": 0.3}, {"probability": lambda k: 0.3})):
        ours, state = train(param, gradients, precond_rule=rule, **options)
        theirs, factors = expected(param, gradients, dense=(len(shape) > 1,) * len(shape), rule=rule, **spelled)
        assert relative(ours, theirs) < 1e-9
        for q, reference in zip(factors_of(state), factors, strict=True):
            assert relative(q, reference) < 1e-9


@pytest.mark.parametrize("rule", ["pro", "eq"])
@pytest.mark.parametrize("delayed", [False, True])
def test_qsgd_applies_the_root(rule, delayed):
    param, gradients = problem((6, 4))
    ours, _ = train(param, gradients, cls=QSGD, precond_rule=rule, delayed=delayed)
    theirs, _ = expected(param, gradients, dense=(True, True), rule=rule, delayed=delayed, root=True)
    assert relative(ours, theirs) < 1e-9


def test_larger_dimensions_are_split_as_asked():
    """Without refreshes, each block has the scale of its own first gradient."""
    param, gradients = problem((5, 7))
    options = {"preconditioner_update_probability": 0, "max_size_triangular": 4}
    ours, state = train(param, gradients, split=True, **options)
    rows, columns = (slice(0, 4), slice(4, 5)), (slice(0, 4), slice(4, 7))
    for corner in ((i, j) for i in rows for j in columns):
        alone, _ = train(param[corner], [g[corner] for g in gradients], **options)
        assert relative(ours[corner], alone) < 1e-12
    whole, _ = train(param, gradients, **options)
    assert relative(ours, whole) > 1e-3
    shapes = [tuple(state["psgd_kron", k]["Q_0"].shape[1:]) for k in range(4)]
    assert shapes == [(4, 4), (4, 4), (1,), (1,)]


def test_the_default_clipping_bounds_the_update():
    param, gradients = problem((6, 4))
    ours, _ = train(param, gradients, extra=(TrustRegionClip(),), precond_init_scale=9.0)
    theirs, _ = expected(
        param, gradients, dense=(True, True), init_scale=9.0, clip=lambda u: trust_region([u], [u])[0]
    )  # fmt: skip
    assert relative(ours, theirs) < 1e-9
    assert PSGDKron([torch.nn.Parameter(param)]).settings.clips == (TrustRegionClip(),)


def test_dimensions_are_merged_as_asked():
    param, gradients = problem((4, 3, 2, 2))
    ours, state = train(param, gradients, merge_dims=True)
    theirs, _ = expected(param.reshape(4, 12), [g.reshape(4, 12) for g in gradients], dense=(True, True))
    assert relative(ours, theirs.reshape(4, 3, 2, 2)) < 1e-9
    assert [tuple(q.shape) for q in factors_of(state)] == [(4, 4), (12, 12)]
    _, state = train(param, gradients, merge_dims=12)
    assert [tuple(q.shape) for q in factors_of(state)] == [(4, 4), (12, 12)]


def test_the_updates_of_a_stack_are_those_of_its_blocks():
    t = PreconditionByKron()
    stack, _ = problem((3, 5, 4), steps=0)
    stack = stack * torch.tensor([1.0, 1e-3, 0.0], dtype=torch.float64).view(3, 1, 1)  # the last is all zeros
    empty = {n: torch.full((3, *s.shape), s.fill, dtype=stack.dtype) for n, s in t.slots(stack[0]).items()}

    def three_steps(rows):
        s, count = {n: v[rows] for n, v in empty.items()}, iter(range(99))
        for step in (1.0, 2.0, 3.0):
            c = context(t, probe=lambda like: probes(next(count), like), step=step)
            u, new = t.update(stack[rows] * (1 + step * (stack[rows] > 0.3)), s, c)
            s |= new
        return {"u": u, **s}

    together = three_steps(slice(0, 3))
    for i in range(3):
        alone = three_steps(slice(i, i + 1))
        for name, value in alone.items():
            assert torch.allclose(together[name][i], value[0], rtol=1e-12, atol=0), name
    assert together["init_scale"][2] == 0 and together["init_scale"][0] != together["init_scale"][1]


@pytest.mark.parametrize(
    ("probability", "first", "wanted"), [(1.0, 5, 8), (1.0, 17, 24), (0.5, 9, 16), (0.1, 17, 20), (0.0, 5, 8)]
)
def test_a_block_whose_gradient_was_zero_starts_soon(probability, first, wanted):
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = PSGDKron([parameter], preconditioner_update_probability=probability, beta=0.0)
    for step in range(1, 33):
        parameter.grad = torch.full_like(parameter, float(step >= first)) + 0.1 * (step >= first) * torch.eye(4, 3)
        optimizer.step()
        if float(optimizer.state[parameter]["init_scale"]):
            break
    assert step == wanted


def context(t, probe, step=1.0, refresh=True):
    return Context(
        param=None, grad=None, step=torch.tensor(step, dtype=torch.float64), divide=None, sum=None, amax=None, numel=None,
        refresh=refresh, probe=probe,
    )  # fmt: skip


def test_the_momentum_is_torchs_exp_avg():
    param, gradients = problem((6, 4))
    _, state = train(param, gradients)
    m = torch.zeros_like(param)
    for g in gradients:
        m = 0.9 * m + 0.1 * g
    assert torch.allclose(state["debiased_average"]["exp_avg"], m, rtol=1e-12)
    _, state = train(param, gradients, momentum_into_precond_update=False)
    assert torch.allclose(state["psgd_kron", 0]["exp_avg"][0], m, rtol=1e-12)
    _, state = train(param, gradients, exp_avg_input=False)
    assert "debiased_average" not in state and "exp_avg" not in state["psgd_kron", 0]
