"""The rules that fit factors: what they whiten, and many stacks at once."""

from __future__ import annotations

import math

import pytest
import torch
from core.kit import normal

from hb_psgd import fitting, kron
from hb_psgd.factor_rules import RULES, Factor, Settings
from hb_psgd.fitting import all_fitted, collected, fitted
from hb_psgd.rule import PreconditionByKron
from hbcore.api import Context
from hbcore.rules.products import IEEE

SETTINGS = Settings(0.1, 0.9, 2, IEEE)


def stack(rows, n, seed, dense=True, pair=False):
    """A factor with evidence, some of whose blocks start in this step."""
    shape = (rows, n, n) if dense else (rows, n)
    first, second = (normal(*shape, seed=seed + i) for i in (0, 1))
    first, second = (x @ x.mT if dense else x.square() for x in (first, second))
    share = (torch.arange(rows) % 2).double()
    q = torch.eye(n, dtype=torch.float64).expand(shape) if dense else torch.ones(shape, dtype=torch.float64)
    q = q * (1 - share).view(-1, *[1] * (len(shape) - 1))
    start = normal(rows, 32 if dense else 0, n, seed=seed + 2)
    return Factor(q, share, normal(rows, seed=seed + 3).abs(), first, second if pair else normal(rows, seed=seed).abs(), start)


def begin(factor):
    return factor if factor.share is None else factor._replace(q=kron.begin([factor.q], factor.share)[0], share=None)


@pytest.mark.parametrize(("together", "moved"), [(1, 2**24), (60, 2**24), (250, 2**24), (2**25, 2**24), (2**25, 60), (250, 1)])
@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_factors_of_several_stacks_are_fitted_as_each_alone(monkeypatch, rule, starts, together, moved):
    """However many are fitted at once, and in how many parts they are moved, over their own evidence."""
    monkeypatch.setattr(fitting, "TOGETHER", together)
    monkeypatch.setattr(fitting, "MOVED", moved)
    pair = rule in ("eq", "qep")
    factors = [
        stack(3, 5, 1, pair=pair), stack(2, 4, 2, pair=pair), stack(7, 5, 3, pair=pair), stack(4, 5, 4, dense=False, pair=pair),
        stack(1, 4, 5, pair=pair), stack(2, 5, 6, dense=False, pair=pair),
    ]  # fmt: skip
    if not starts:
        factors = [begin(factor) for factor in factors]
    given, before = list(factors), [factor.q.clone() for factor in factors]
    portions = all_fitted(RULES[rule], given, SETTINGS)
    made, bounds, old = (collected(portions, get) for get in (lambda p: p.new, lambda p: p.bound, lambda p: p.old))
    assert not given and set(made) == set(range(len(factors)))
    assert all(torch.equal(factor.q, q) for factor, q in zip(factors, before, strict=True))  # they are the state's own
    monkeypatch.undo()
    for k, factor in enumerate(factors):
        q, bound = made[k], bounds[k]
        begun = begin(factor)
        alone, risen = fitted(RULES[rule], begun, SETTINGS)
        assert q.shape == factor.q.shape and torch.equal(old[k], begun.q)
        assert torch.allclose(q, alone, rtol=1e-10, atol=1e-12)
        assert torch.allclose(bound, risen, rtol=1e-12)


def test_no_portion_is_larger_than_its_bound_and_all_rows_are_in_one():
    portions = list(fitting._portions([(0, 5), (1, 1), (4, 9)], 4))
    assert [sum(part.stop - part.start for _, part in portion) for portion in portions] == [4, 4, 4, 3]
    rows = [(k, row) for portion in portions for k, part in portion for row in range(part.start, part.stop)]
    assert rows == [(k, row) for k, count in ((0, 5), (1, 1), (4, 9)) for row in range(count)]


@pytest.mark.parametrize("rule", RULES)
def test_a_learning_rate_of_zero_leaves_a_symmetric_factor(rule):
    for dense in (True, False):
        factor = stack(3, 5, 1, dense, pair=rule in ("eq", "qep"))
        q, bound = fitted(RULES[rule], begin(factor), SETTINGS._replace(lr=0.0))
        assert torch.allclose(q, begin(factor).q, rtol=1e-12)
        assert bool((bound > 0).all())


def mixers(shape, diagonal):
    """Matrices M_i such that gradients ``(M_0 x M_1 x ...) z``, z standard normal, have a covariance of condition 10."""
    least = 10 ** (-0.5 / len(shape))
    scales = [torch.diag(torch.linspace(0, math.log(least), n, dtype=torch.float64).exp()) for n in shape]
    turns = [torch.linalg.qr(normal(n, n, seed=n)).Q for n in shape]
    return scales if diagonal else [t @ m @ t.mT for t, m in zip(turns, scales, strict=True)]


def departure(mixed, factors, diagonal):
    """How far ``P g`` is from white: the relative distance of its covariance from the identity, or of its diagonal."""
    c = p = torch.ones(1, 1, dtype=torch.float64)
    for m, q in zip(mixed, factors, strict=True):
        q = q.double() if q.ndim == 2 else torch.diag(q.double())
        c, p = torch.kron(c, m @ m.mT), torch.kron(p, q.mT @ q)
    white = p @ c @ p
    white = torch.diag(white.diagonal()) if diagonal else white
    return float(torch.linalg.matrix_norm(white - torch.eye(len(white), dtype=torch.float64)) / len(white) ** 0.5)


@pytest.mark.parametrize("diagonal", [False, True], ids=["dense", "diagonal"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_whitens_gradients_of_condition_10_within_a_tenth(rule, diagonal):
    """The bound is the noise of one gradient a step at this learning rate: after 450 steps there is little else."""
    shape, generator = (6, 5, 4), torch.Generator().manual_seed(1)
    t = PreconditionByKron(precond_rule=rule, precond_lr=0.01, memory_save_mode="all_diag" if diagonal else None)
    s = {name: torch.zeros(1, *slot.shape) for name, slot in t.slots(torch.zeros(shape)).items()}
    mixed, path = mixers(shape, diagonal), []

    def probe(like):
        return torch.randn(like.shape, generator=generator)

    for step in range(1, 601):
        z = torch.randn(1, *shape, generator=generator)
        g = kron.multiply(z, [m.float()[None] for m in mixed], IEEE)
        c = Context(
            param=None, grad=None, step=torch.tensor(float(step), dtype=torch.float64), divide=None, sum=None, amax=None,
            numel=None, refresh=True, probe=probe,
        )  # fmt: skip
        s = {**s, **t.update(g, s, c)[1]}
        if step == 1 or (step > 450 and step % 25 == 0):
            path.append(departure(mixed, [s[f"Q_{i}"][0] for i in range(3)], diagonal))
    assert path[0] > 0.3
    assert sum(path[1:]) / len(path[1:]) < 0.1, path
