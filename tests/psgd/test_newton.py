"""The Newton form's formulas, against their float64 oracle and against whitening."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core.kit import distance, normal
from core.plain import plain
from reference.psgd_newton import newton, newton_kron

from hb_psgd import kron
from hb_psgd.common import DebiasedAverage
from hb_psgd.factor_rules import RULES, Factor, Settings
from hb_psgd.fitting import all_fitted, collected, settle
from hb_psgd.kron import second_moments, whitening_scale
from hb_psgd.newton import newton_scale
from hb_psgd.norms import PROBES
from hb_psgd.rule import PreconditionByKron
from hbcore.rules.products import IEEE

B = 3
SHAPES = {
    "matrix": ((5, 4), (True, True)),
    "wide": ((3, 7), (True, False)),
    "diagonals": ((6, 4), (False, False)),
    "vector": ((9,), (False,)),
    "convolution": ((4, 3, 2, 2), (True, False, True, True)),
    "one": ((1,), (False,)),
}


def drawn(i, shape):
    return np.random.default_rng([7, i]).standard_normal(shape)


def begun(shape, dense, dtype=torch.float64):
    """Factors near the identity, not symmetric."""
    factors = []
    for i, (n, d) in enumerate(zip(shape, dense, strict=True)):
        one = torch.eye(n, dtype=torch.float64) if d else torch.ones(n, dtype=torch.float64)
        factors.append((one + 0.2 * normal(B, *one.shape, seed=i)).to(dtype))
    return factors


def precondition(x, factors):
    return kron.precondition(x, factors, IEEE)


def fitted(rule, g, v, factors, bounds, *, lr, beta, probe, iterations=2, whitens=False):
    """One step of a rule, with a Hessian-vector product or, if it ``whitens``, a gradient."""
    gather = RULES[rule].evidence if whitens else RULES[rule].newton
    zero = torch.zeros(len(g), dtype=g.dtype)
    some = []
    for q, bound, (first, second) in zip(
        factors, bounds, gather(g, v, factors, lambda x: precondition(x, factors), IEEE), strict=True
    ):
        like = q.new_empty(len(q), PROBES if q.ndim == 3 else 0, q.shape[-1])
        some.append(Factor(q, zero, bound, first, second, probe(like) if q.ndim == 3 else like))
    portions = all_fitted(RULES[rule], some, Settings(lr, beta, iterations, IEEE))
    risen = settle(portions, [range(len(factors))], bounds)
    made = collected(portions, lambda portion: portion.new)
    return [made[k] for k in range(len(factors))], risen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_rule_agrees_with_its_oracle(name, rule):
    shape, dense = SHAPES[name]
    factors, bounds = begun(shape, dense), [torch.zeros(B, dtype=torch.float64) for _ in shape]
    if rule == "eq":
        factors = [q.triu() if q.ndim == 3 else q for q in factors]
    theirs = [[q[b].numpy() for q in factors] for b in range(B)]
    lipschitz = [[0.0] * len(shape) for _ in range(B)]
    for step in range(5):
        v = normal(B, *shape, seed=10 + step)
        h = v * torch.linspace(0.2, 3, v[0].numel(), dtype=torch.float64).view(shape) * 2.0 ** (step - 3)
        counter = iter(range(100))
        factors, bounds = fitted(
            rule, h, v, factors, bounds, lr=0.3, beta=0.8, iterations=3,
            probe=lambda like, i=counter: torch.from_numpy(drawn(next(i), like.shape[1:])).expand(like.shape),
        )  # fmt: skip
        for b in range(B):
            counter = iter(range(100))
            theirs[b] = newton(
                rule, h[b].numpy(), v[b].numpy(), theirs[b], lipschitz[b],
                lambda size, i=counter: drawn(next(i), size), 0.3, 0.8, 3,
            )  # fmt: skip
    for i, (q, bound) in enumerate(zip(factors, bounds, strict=True)):
        assert distance(list(q), [torch.from_numpy(own[i]) for own in theirs]) < 1e-9
        assert torch.allclose(bound, torch.tensor([own[i] for own in lipschitz], dtype=torch.float64), rtol=1e-9)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "eq"])
def test_where_a_product_is_undone_nothing_changes(rule):
    factors = begun((5, 4), (True, False))
    factors = [factors[0] @ factors[0].mT, factors[1].abs()]  # symmetric: Procrustes has nothing to turn
    h = normal(B, 5, 4, seed=5)
    v, zero = precondition(h, factors), [torch.zeros(B).double()] * 2
    made, _ = fitted(rule, h, v, factors, zero, lr=0.5, beta=0.9, probe=lambda like: torch.ones_like(like))
    assert distance([precondition(h, made)], [v]) < 1e-10


@pytest.mark.parametrize("rule", ["pro", "quad", "qeq"])
def test_whitening_is_the_mean_over_vectors(rule):
    """Of one factor, with a v whose second moments are their mean: what is left is how the bound is taken, T + t for both."""
    v = torch.linalg.qr(normal(B, 6, 6, seed=1)).Q * 6**0.5
    assert distance([second_moments(v, 0, True, IEEE)], [6 * torch.eye(6, dtype=torch.float64).expand(B, 6, 6)]) < 1e-12
    h, (q, one), zero = normal(B, 6, 6, seed=2), begun((6, 6), (True, True)), [torch.zeros(B).double()] * 2
    one = torch.eye(6, dtype=torch.float64).expand(B, 6, 6)
    rest = {"lr": 0.1, "beta": 0.9, "probe": lambda like: normal(*like.shape, seed=4), "iterations": 200}
    ours = fitted(rule, h, v, [q, one], zero, **rest)
    whitened = fitted(rule, h, v, [q, one], zero, whitens=True, **rest)
    assert distance(ours[0], whitened[0]) < 1e-6
    assert distance(ours[1], whitened[1]) < 1e-6


def test_the_first_scale_makes_products_as_large_as_their_vectors():
    v = normal(B, 50, 40, seed=3)
    h = 1e-3 * v.sign()  # all of one size
    scale = newton_scale(h, v, 1e-9)
    assert torch.allclose(scale**2 * 1e-3, v.flatten(1).square().mean(1).sqrt(), rtol=1e-6)
    assert torch.equal(newton_scale(h, torch.ones_like(h), 1e-9), whitening_scale(h, 1e-9))
    bad = torch.stack([torch.zeros(2, 2), torch.full((2, 2), torch.inf), torch.full((2, 2), torch.nan)])
    assert not newton_scale(bad, torch.ones(3, 2, 2), 1e-9).any()


@pytest.mark.parametrize(("rule", "interval"), [("quad", 1), ("quad", 2), ("pro", 3), ("eq", 2)])
@pytest.mark.parametrize("name", ["matrix", "wide", "vector"])
def test_the_optimizers_rule_agrees_with_its_oracle(name, rule, interval):
    """From the first product on, in between whitening."""
    shape, dense = SHAPES[name]
    gradients = [normal(*shape, seed=20 + k) * 2.0 ** (k % 3) for k in range(8)]

    def pairs(k):
        if (k - 1) % interval:
            return None
        v = normal(*shape, seed=40 + k)
        return v, v * torch.linspace(0.2, 3, v.numel(), dtype=torch.float64).view(shape)

    def theirs_of(k):
        pair = pairs(k)
        return None if pair is None else tuple(t.numpy() for t in pair)

    options = {"precond_lr": 0.3, "lower_bound_beta": 0.8, "dampening": 1e-3}
    kron_rule = PreconditionByKron(hessian_approx=True, max_size_triangular=6, precond_rule=rule, **options)
    start, counter = normal(*shape, seed=1), iter(range(1000))
    ours, state = plain(
        lambda h: (DebiasedAverage(), kron_rule), {"lr": 0.1}, start, gradients,
        probes=lambda i, like: torch.from_numpy(drawn(i, like.shape[1:])).expand(like.shape), pairs=pairs,
    )  # fmt: skip
    theirs, factors = newton_kron(
        start.numpy(), [g.numpy() for g in gradients], theirs_of, dense=dense, lr=0.1, rule=rule,
        draw=lambda size: drawn(next(counter), size), **options,
    )  # fmt: skip
    assert distance([ours], [torch.from_numpy(theirs)]) < 1e-9
    slots = state["psgd_kron", 0]
    assert distance([slots[f"Q_{i}"][0] for i in range(len(shape))], list(map(torch.from_numpy, factors))) < 1e-9
