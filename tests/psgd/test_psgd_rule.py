"""PSGDKron's rule against its float64 oracle, through the plain driver, and what it must survive."""

from __future__ import annotations

import inspect
import itertools
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core.plain import plain
from reference.clipping import trust_region
from reference.psgd import psgd_kron, refreshes

import hb_psgd
import hbcore
from hb_psgd import PSGDKron
from hb_psgd.kron import precondition
from hb_psgd.psgd import HYPERPARAMETERS, NOT_YET, PreconditionByKron, update_probability
from hbcore import registry
from hbcore.api import Context, Domain
from hbcore.errors import HyperparameterError, OptionError
from hbcore.rules.clipping import TrustRegionClip

STEPS = 18
DYNAMIC = ("beta", "precond_lr", "lower_bound_beta", "dampening", "precond_init_scale_scale")


def drawn(i, shape):
    return np.random.default_rng([3, i]).standard_normal(shape)


def probes(i, like):
    """One draw for every block of the stack, so that a stack equals its blocks one by one."""
    return torch.from_numpy(drawn(i, like.shape[1:])).expand(like.shape)


def chain_of(**options):
    """PSGDKron's chain; its structural fields stay plain values, as the engine hands them over."""
    given = {name: getattr(PreconditionByKron(), name) for name in HYPERPARAMETERS} | options
    return lambda h: PSGDKron.chain(SimpleNamespace(**{**given, **{n: getattr(h, n) for n in DYNAMIC}}))


def train(param, gradients, *, extra=(), rule_probes=probes, **options):
    numbers = {"lr": 0.01} | {n: options.get(n, getattr(PreconditionByKron(), n)) for n in DYNAMIC}
    chain = chain_of(**options)
    return plain(lambda h: (*chain(h), *extra), numbers, param, gradients, probes=rule_probes)


def problem(shape, dtype=torch.float64, steps=STEPS, seed=0):
    """A parameter and gradients whose elements are correlated and of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = []
    for step in range(steps):
        g = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0 ** (step % 5 - 6)
        for axis, n in enumerate(g.shape):
            g = g * torch.linspace(0.2, 3, n, dtype=torch.float64).view([-1 if a == axis else 1 for a in range(g.ndim)])
            g = g + 0.4 * g.flip(axis) if n > 1 else g
        gradients.append(g.to(dtype))
    return param.to(dtype), gradients


def expected(param, gradients, **options):
    counter = iter(range(10**6))
    options = {"lr": 0.01} | options
    return psgd_kron(
        param.double().numpy(), [g.double().numpy() for g in gradients],
        draw=lambda shape: drawn(next(counter), shape), **options,
    )  # fmt: skip


def relative(ours, theirs):
    theirs = torch.as_tensor(theirs)
    return float((ours.double() - theirs).norm() / theirs.norm())


def factors_of(state):
    slots = state["psgd_kron", 0]
    return [slots[name][0] for name in sorted(slots) if name.startswith("Q_")]


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
    assert torch.allclose(state["psgd_kron", 0]["exp_avg"][0], m, rtol=1e-12)
    _, state = train(param, gradients, exp_avg_input=False)
    assert "exp_avg" not in state["psgd_kron", 0]


class TestSchedule:
    """preconditioner_update_probability."""

    @pytest.mark.parametrize(("steps", "total"), [(1_000, 1_000), (2_000, 1_631), (5_000, 1_983), (10_000, 2_133)])
    def test_the_default_refreshes_as_often_as_documented(self, steps, total):
        rates = [PreconditionByKron().rate(k) for k in range(1, steps + 1)]
        assert math.floor(math.fsum(rates) + 2**-10) == total
        assert sum(refreshes(update_probability, steps)) == total

    @pytest.mark.parametrize(("given", "rate"), [(0, 0), (0.0, 0), (False, 0), (1, 1), (1.0, 1), (0.25, 0.25)])
    def test_numbers_are_taken_as_they_are(self, given, rate):
        assert {PreconditionByKron(preconditioner_update_probability=given).rate(k) for k in (1, 10, 10**5)} == {rate}

    def test_a_function_is_asked_for_every_step(self):
        t = PreconditionByKron(preconditioner_update_probability=update_probability)
        assert [t.rate(k) for k in (1, 1500, 10**6)] == [update_probability(k) for k in (1, 1500, 10**6)]
        assert pickle.loads(pickle.dumps(t)) == t
        assert PreconditionByKron(preconditioner_update_probability=lambda k: 3).rate(1) == 1

    @pytest.mark.parametrize("given", [-0.1, 1.5, float("nan"), "often"])
    def test_other_values_are_refused(self, given):
        with pytest.raises(HyperparameterError, match=r"preconditioner_update_probability=.*\[0, 1\]"):
            PSGDKron([torch.nn.Parameter(torch.zeros(2))], preconditioner_update_probability=given)

    def test_factors_change_when_due_only(self):
        param, gradients = problem((6, 4))
        seen = []
        for steps in range(1, 9):
            _, state = train(param, gradients[:steps], preconditioner_update_probability=0.25)
            seen.append(torch.cat([q.flatten() for q in factors_of(state)]))
        assert [not torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [i % 4 == 2 for i in range(7)]


class TestZeros:
    """A gradient of zeros says nothing about the scale of what is to come."""

    @pytest.mark.parametrize("shape", [(6, 4), (9,), ()], ids=str)
    @pytest.mark.parametrize("options", [{}, {"delayed": True}, {"preconditioner_update_probability": 0.3}], ids=str)
    def test_first_gradients_of_zeros_wait_for_others(self, shape, options):
        param, gradients = problem(shape)
        zeros = [torch.zeros_like(param)] * 3
        still, state = train(param, zeros, **options)
        assert torch.equal(still, param)
        assert all(torch.equal(q, torch.zeros_like(q)) for q in factors_of(state))
        ours, _ = train(param, zeros + gradients, **options)
        spelled = {"probability": lambda k: 0.3} if "preconditioner_update_probability" in options else options
        dense = (True, True) if len(shape) == 2 else (False,)
        assert relative(ours, expected(param, zeros + gradients, dense=dense, **spelled)[0]) < 1e-9

    @pytest.mark.parametrize("shape", [(6, 4), (4, 3, 2, 2), (9,), ()], ids=str)
    def test_zeros_at_any_time_leave_everything_finite(self, shape):
        param, gradients = problem(shape, torch.float32)
        gradients = [g * (i % 4 != 3) for i, g in enumerate(gradients)] + [torch.zeros_like(param)] * 100
        ours, state = train(param, gradients)
        assert finite(ours, *state["psgd_kron", 0].values())

    def test_a_scale_that_is_given_does_not_wait(self):
        param, _ = problem((6, 4))
        _, state = train(param, [torch.zeros_like(param)], precond_init_scale=4.0, preconditioner_update_probability=0)
        for q in factors_of(state):
            assert torch.allclose(q, 2 * torch.eye(len(q), dtype=q.dtype))

    @pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-15, 1e-11, 1e-4, 1e4, 1e8])
    @pytest.mark.parametrize("shape", [(6, 4), (9,), ()], ids=str)
    def test_gradients_of_any_size_leave_everything_finite_in_float32(self, shape, size):
        param, gradients = problem(shape, torch.float32)
        coarse = [(g * size).bfloat16().float() for g in gradients]
        ours, state = train(param, coarse * 3)
        assert finite(ours, *state["psgd_kron", 0].values())

    def test_the_first_update_has_elements_of_size_1(self):
        for size in (1e-7, 1.0, 1e5):
            param = torch.zeros(50, 40, dtype=torch.float64)
            g = torch.randn(param.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * size
            ours, _ = train(param, [g], lr=1.0, preconditioner_update_probability=0)
            assert 0.7 < float((ours / 0.01).square().mean().sqrt()) < 1.3


def finite(*tensors):
    return all(bool(torch.isfinite(t).all()) for t in tensors)


@pytest.mark.parametrize("options", [{}, {"memory_save_mode": "all_diag"}], ids=["dense", "diagonal"])
def test_gradients_are_whitened(options):
    """Gradients ``A Z B``, Z standard normal, have the covariance ``B^T B x A A^T``; preconditioned ones the identity."""
    generator = torch.Generator().manual_seed(5)
    scales = [torch.logspace(-1.5, 0.5, n, dtype=torch.float64) for n in (6, 4)]
    mixers = [torch.diag(s) for s in scales]
    if not options:
        turns = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for n in (6, 4)]
        mixers = [t @ m @ t.mT for t, m in zip(turns, mixers, strict=True)]

    def gradient(count=1):
        return mixers[0] @ torch.randn(count, 6, 4, generator=generator, dtype=torch.float64) @ mixers[1]

    def departure(factors):
        flat = precondition(gradient(20_000), [q.expand(20_000, *q.shape) for q in factors]).flatten(1)
        return float(torch.linalg.matrix_norm(flat.mT @ flat / 20_000 - torch.eye(24, dtype=torch.float64)) / 24**0.5)

    start = {"exp_avg_input": False, "rule_probes": None, **options}
    param = torch.zeros(6, 4, dtype=torch.float64)
    _, first = train(param, [gradient()[0]], preconditioner_update_probability=0, **start)
    _, last = train(param, [gradient()[0] for _ in range(600)], precond_lr=0.03, **start)
    assert departure(factors_of(first)) > 1.4
    assert departure(factors_of(last)) < 0.25
    for q in factors_of(last):
        assert q.ndim == 1 or float((q - q.mT).norm() / q.norm()) < 0.01  # what the Procrustes steps are for


class TestOptimizer:
    """The class, its names and what it refuses."""

    def test_it_is_a_matrix_rule_with_exact_factors(self):
        t = PreconditionByKron()
        assert t.domain == Domain.MATRIX
        slots = t.slots(torch.empty(6, 4))
        assert {n: tuple(s.shape) for n, s in slots.items()} == {
            "exp_avg": (6, 4), "init_scale": (), "Q_0": (6, 6), "L_0": (), "Q_1": (4, 4), "L_1": (),
        }  # fmt: skip
        assert {n for n, s in slots.items() if not s.exact} == {"exp_avg"}

    def test_names_and_defaults(self):
        shown = inspect.signature(PSGDKron).parameters
        defaults = {
            "lr": 0.001, "beta": 0.9, "update_clipping": "trust_region_clip_", "precond_lr": 0.1, "max_size_triangular": 2048,
            "min_ndim_triangular": 2, "memory_save_mode": None, "momentum_into_precond_update": True, "exp_avg_input": True,
            "delayed": False, "merge_dims": False, "lower_bound_beta": 0.9, "dampening": 1e-9, "weight_decay": 0.0,
            "precond_update_power_iterations": 2, "precond_init_scale": None, "precond_init_scale_scale": 1.0,
            "precond_init_scale_power": None, "preconditioner_update_probability": None,
        }  # fmt: skip
        assert {n: shown[n].default for n in defaults} == defaults
        group = PSGDKron([torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
        assert {n: group[n] for n in HYPERPARAMETERS} == {n: shown[n].default for n in HYPERPARAMETERS}

    def test_betas_is_another_spelling(self):
        params = [torch.nn.Parameter(torch.zeros(2))]
        assert PSGDKron(params, betas=(0.5, 0.999)).param_groups[0]["beta"] == 0.5
        assert PSGDKron(params, beta=0.7).param_groups[0]["beta"] == 0.7

    @pytest.mark.parametrize("option", NOT_YET)
    def test_options_that_are_not_there_yet_are_refused_by_name(self, option):
        params = [torch.nn.Parameter(torch.zeros(2))]
        PSGDKron(params, **{option: NOT_YET[option]})
        other = {"q_dtype": "bfloat16"}.get(option, not NOT_YET[option])
        with pytest.raises(OptionError, match=f"PSGDKron: {option}="):
            PSGDKron(params, **{option: other})

    @pytest.mark.parametrize(
        ("options", "error", "said"),
        [
            ({"memory_save_mode": "none"}, OptionError, "memory_save_mode='none' is not one of None, 'one_diag'"),
            ({"precond_lr": 1.5}, HyperparameterError, r"precond_lr=1\.5 .*\[0, 1\]"),
            ({"beta": 1.0}, HyperparameterError, r"beta=1\.0 .*\[0, 1\)"),
            ({"dampening": -1}, HyperparameterError, r"dampening=-1 .*\[0, inf\)"),
            ({"lower_bound_beta": 1}, HyperparameterError, r"lower_bound_beta=1 .*\[0, 1\)"),
            ({"precond_init_scale": 0.0}, HyperparameterError, r"precond_init_scale=0\.0"),
            ({"precond_init_scale_scale": 0.0}, HyperparameterError, r"precond_init_scale_scale=0\.0 .*\(0, inf\)"),
            (
                {"precond_update_power_iterations": 0},
                HyperparameterError,
                "precond_update_power_iterations=0 is not a whole number from 1 on",
            ),
            ({"precond_update_power_iterations": "2"}, HyperparameterError, "precond_update_power_iterations='2'"),
            ({"hvp_interval": 0}, HyperparameterError, "hvp_interval=0 is not a whole number from 1 on"),
            ({"hessian_approx": "exact"}, HyperparameterError, "hessian_approx='exact' is neither True nor False"),
            ({"finite_differences": 1e-3}, HyperparameterError, r"finite_differences=0\.001 is neither True nor False"),
        ],
        ids=str,
    )
    def test_values_out_of_range_are_refused(self, options, error, said):
        with pytest.raises(error, match=said):
            PSGDKron([torch.nn.Parameter(torch.zeros(2))], **options)

    def test_a_rule_that_does_not_exist_is_refused(self):
        with pytest.raises(OptionError, match="rule='eq' is not one of pro"):
            PreconditionByKron(rule="eq")

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_old_names_resolve_to_their_presets(self):
        assert hbcore.get("hb_psgd:PSGDKron") is hbcore.get("psgd-kron") is hb_psgd.PSGDKron is PSGDKron
        for name in ("ForeachPSGDKron", "ForeachCachedPSGDKron", "CachedPSGDKron"):
            assert hbcore.get(name) is PSGDKron
        presets = {
            "exp_avg_input": ("ForeachPurePSGD", "PurePSGD"),
            "delayed": ("ForeachDelayedPSGD", "DelayedPSGD", "ForeachCachedDelayedPSGDKron", "CachedDelayedPSGDKron"),
        }
        for option, names in presets.items():
            for name in names:
                group = hbcore.create(name, [torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
                assert group[option] is (option == "delayed")
        assert {a for names in presets.values() for a in names} < set(registry.info("PSGDKron").aliases)
        for name, interval in (("ForeachCachedNewtonPSGD", 1), ("NewtonPSGDKron", 1), ("NewtonHybrid2PSGDKron", 2)):
            group = hbcore.create(name, [torch.nn.Parameter(torch.zeros(2))]).param_groups[0]
            assert (group["hessian_approx"], group["hvp_interval"]) == (True, interval)
