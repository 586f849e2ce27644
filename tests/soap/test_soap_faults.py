"""Faults that rules of SOAP's kind have had, shown by properties that need no oracle, and by oracles with the fault."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import reference.soap_family as family
import torch
from core.kit import distance
from reference.adamw import adamw
from reference.soap import turned
from soap.family import FAMILY, normal, row, settings_of, stream, trained, wanted

import hbcore

ELEMENTWISE = [name for name in FAMILY if "Shampoo" not in name]
"""Those that run an elementwise rule in the basis."""
AVERAGED = {name: {"exp_avg": 0.9} for name in ELEMENTWISE if "SOLP" not in name and name != "SFSOAP"}
AVERAGED |= {name: {"exp_avg_fast": 0.9, "exp_avg_slow": 0.99} for name in AVERAGED if "AdEMAMix" in name}
"""First moments of gradients, and their decay rates."""
KL = [name for name in FAMILY if "KL" in name]


def stepping(name, start, grads, changed=None):
    """The parameter and its state after each gradient but the first."""
    param = torch.nn.Parameter(start.clone())
    optimizer = hbcore.get(name)([param], compile="eager", **settings_of(name, changed))
    for k, g in enumerate(grads):
        param.grad = g.clone()
        optimizer.step()
        if k > 0:
            yield param.detach(), optimizer.state[param]


@pytest.mark.parametrize("name", AVERAGED)
def test_first_moments_are_averages_of_the_gradients_whatever_the_bases_were(name):
    grads = stream((5, 5), 12)
    means = {slot: torch.zeros(5, 5, dtype=torch.float64) for slot in AVERAGED[name]}
    for g, (_, state) in zip(grads[1:], stepping(name, normal(5, 5, seed=1), grads), strict=True):
        left, right = (state[f"Q_{i}"] for i in range(2))
        for slot, beta in AVERAGED[name].items():
            means[slot] = beta * means[slot] + (1 - beta) * g
            assert distance([left @ state[slot] @ right.T], [means[slot]]) < 1e-10


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_second_moments_stay_with_their_directions(name):
    """Among unit vectors a refresh can only re-order: read outside the basis, the average is that of squared gradients."""
    weights = torch.linspace(0.2, 2, 5, dtype=torch.float64)
    grads = [torch.diag(g) for g in normal(6, 5, seed=3) * weights] + [
        torch.diag(g) for g in normal(6, 5, seed=4) * weights.flip(0)
    ]
    mean, order = torch.zeros(5, 5, dtype=torch.float64), []
    for g, (_, state) in zip(grads[1:], stepping(name, normal(5, 5, seed=1), grads), strict=True):
        mean = 0.95 * mean + 0.05 * g**2
        left, right = (state[f"Q_{i}"] ** 2 for i in range(2))
        assert distance([left @ state["exp_avg_sq"] @ right.T], [mean]) < 1e-10
        order.append(tuple((state["Q_0"].T @ state["GG_0"] @ state["Q_0"]).diagonal().argsort().tolist()))
    assert len(set(order)) > 3, "nothing was re-ordered: the test would be empty"


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_beta2_decays_the_second_moment(name):
    """Neither permutations nor squared rotations change the sum of its elements."""
    betas = (0.9, 0.3, 0.99)[: len(settings_of(name)["betas"])]
    grads, total = stream((5, 5), 12), 0.0
    for g, (_, state) in zip(grads[1:], stepping(name, normal(5, 5, seed=1), grads, {"betas": betas}), strict=True):
        total = 0.3 * total + 0.7 * float(g.square().sum())
        assert float(state["exp_avg_sq"].sum()) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_gradients_below_eps_hardly_move_anything(name):
    start, grads = normal(5, 5, seed=1), [1e-12 * g for g in stream((5, 5), 12)]
    moved = [float((trained(name, start, grads, {"eps": eps})[0] - start).abs().max()) for eps in (1e-5, 1e-20)]
    assert moved[0] < 1e-6 < 1e-2 < moved[1]


@pytest.mark.parametrize("name", ["KLShampoo", "HeavyKLShampoo"])
def test_above_all_eigenvalues_eps_is_what_kl_shampoo_divides_by(name):
    """Two factors, the root of each: ``m / eps``."""
    start, grads, expected, m = normal(5, 5, seed=1), stream((5, 5), 12), normal(5, 5, seed=1), 0.0
    for g in grads[1:]:
        m = 0.9 * m + 0.1 * g
        expected = expected - 0.05 * m / 1e6
    ours, _ = trained(name, start, grads, {"eps": 1e6})
    assert distance([ours - start], [expected - start]) < 1e-8


@pytest.mark.parametrize("name", ["KLShampoo", "HeavyKLShampoo"])
def test_kl_shampoos_factors_stay_of_one_size(name):
    """The path does not show it: the larger one factor, the smaller what the other averages."""
    for _, state in stepping(name, normal(4, 7, seed=1), stream((4, 7), 12)):
        assert float(state["GG_0"].abs().max()) == pytest.approx(float(state["GG_1"].abs().max()), rel=1e-10)


right = family.Block.refresh


def average_left_behind(block):
    """Turn the bases, and leave the first moment."""
    first = block.moments.first
    right(block)
    block.moments.first = first


def squares_left_behind(block):
    """Turn the bases, and leave the second moment."""
    second = block.moments.second
    right(block)
    block.moments.second = second


def with_the_first_basis(block):
    """Never refresh."""


def not_debiased(block, i, t):
    """Eigenvalues of an average that started from zero."""
    return np.diag(block.bases[i].T @ block.factors[i] @ block.bases[i])


FAULTS = {
    "average-in-the-old-basis": ("refresh", average_left_behind, [name for name in ELEMENTWISE if name != "SFSOAP"]),
    "squares-in-the-old-order": ("refresh", squares_left_behind, ELEMENTWISE),
    "the-first-basis-for-ever": ("refresh", with_the_first_basis, FAMILY),
    "plain-products": ("kl", family.Block.outer, KL),
    "eigenvalues-not-debiased": ("eigenvalues", not_debiased, KL),
}
PAIRS = [row(name, fault) for fault, (*_, names) in FAULTS.items() for name in names]


@pytest.mark.parametrize(("name", "fault"), PAIRS)
def test_a_rule_with_the_fault_ends_elsewhere(monkeypatch, name, fault):
    """So that the comparison with the oracle is one that the fault fails."""
    start, grads, (method, wrong, _) = normal(5, 5, seed=1), stream((5, 5)), FAULTS[fault]
    expected = wanted(name, start, grads)
    monkeypatch.setattr(family.Block, method, wrong)
    assert distance([wanted(name, start, grads) - start], [expected - start]) > 1e-3
    assert distance([trained(name, start, grads)[0] - start], [expected - start]) < 1e-9


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name.startswith("Heavy")])
def test_a_heavy_rule_that_permutes_ends_elsewhere(monkeypatch, name):
    start, grads = normal(5, 5, seed=1), stream((5, 5))
    expected = wanted(name, start, grads)
    monkeypatch.setitem(FAMILY[name], "transport", "permute")
    assert distance([wanted(name, start, grads) - start], [expected - start]) > 1e-3
    assert distance([trained(name, start, grads)[0] - start], [expected - start]) < 1e-9


def orthogonal(n, seed):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


@pytest.mark.parametrize("name", [*ELEMENTWISE, "AdamW"])
def test_rotated_gradients_rotate_the_path(name):
    """KL-Shampoo starts from unit vectors, and forgets them only slowly."""
    start, grads, left, right = normal(5, 5, seed=1), stream((5, 5)), orthogonal(5, 6), orthogonal(5, 7)
    if name == "AdamW":
        train = adamw_trained
    else:
        train = partial(after, name)
    moved = train(start, grads) - start
    elsewhere = train(left @ start @ right.T, [left @ g @ right.T for g in grads]) - left @ start @ right.T
    far = distance([elsewhere], [left @ moved @ right.T])
    assert far < 1e-6 if name != "AdamW" else far > 1e-2


def after(name, start, grads):
    return trained(name, start, grads)[0]


def adamw_trained(start, grads):
    return torch.tensor(adamw(start.numpy(), [g.numpy() for g in grads], lr=0.05))


def with_eigh(start, grads):
    """SOAP with ``eigh`` at every step, each new eigenvector in the place of the one most like it."""
    theta, m, v, bases, factors = start, np.zeros((5, 5)), np.zeros((5, 5)), {}, [0.0, 0.0]
    for t, g in enumerate(grads):
        if t > 0:
            rotated = turned(g, bases)
            m, v = 0.9 * m + 0.1 * rotated, 0.95 * v + 0.05 * rotated**2
            u = m / (1 - 0.9**t) / np.maximum(np.sqrt(v / (1 - 0.95**t)), 1e-3)
            theta = theta - 0.05 * turned(u, bases, back=True)
        factors = [0.9 * p + 0.1 * x @ x.T for p, x in zip(factors, (g, g.T), strict=True)]
        found = {i: np.linalg.eigh(p)[1] for i, p in enumerate(factors)}
        if t > 0:
            m = turned(m, bases, back=True)
            overlaps = {i: bases[i].T @ q for i, q in found.items()}
            found = {i: q[:, np.abs(overlaps[i]).argmax(1)] for i, q in found.items()}
            m = turned(m, found)
        bases = found
    return theta


@pytest.mark.parametrize("name", ["SOAP", "HeavySOAP", "KLSOAP", "HeavyKLSOAP"])
def test_where_eigenvectors_stay_it_is_eigh_at_every_step(name):
    """The eigenvalues change, and their order; the KL factors have the same eigenvectors here."""
    left, right = orthogonal(5, 6), orthogonal(5, 7)
    values = normal(30, 5, seed=3).abs() + torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    values[15:] = values[15:].flip(1)
    draws = torch.Generator().manual_seed(8)
    moved = [torch.eye(5, dtype=torch.float64)[torch.randperm(5, generator=draws)] for _ in values]
    grads = [left @ torch.diag(s) @ m @ right.T for s, m in zip(values, moved, strict=True)]
    start = normal(5, 5, seed=1)
    expected = torch.tensor(with_eigh(start.numpy(), [g.numpy() for g in grads]))
    ours, _ = trained(name, start, grads, {"precondition_frequency": 1, "eps": 1e-3})
    assert distance([ours - start], [expected - start]) < 1e-7


@pytest.mark.parametrize("name", ["SOAP", "KLSOAP", "KLShampoo", "HeavyKLSOAP"])
def test_bases_stay_orthonormal_for_a_thousand_steps(name):
    start, grads = normal(8, 6, seed=1, dtype=torch.float32), stream((8, 6), 1000, dtype=torch.float32)
    worst, last = 0.0, None
    for k, (_, state) in enumerate(stepping(name, start, grads, {"precondition_frequency": 1})):
        last = state
        if k % 50 == 0 or k > 990:
            defects = (state[f"Q_{i}"].double() for i in range(2))
            worst = max([worst, *(float((q.T @ q - torch.eye(len(q))).abs().max()) for q in defects)])
    assert last is not None and worst < 1e-4


EXTREME = {
    "rank-1": lambda g: g[:1] * g[:, :1],
    "zero": lambda g: 0.0 * g,
    "1e-30": lambda g: 1e-30 * g,
    "1e14": lambda g: 1e14 * g / g.abs().max(),
    "1e18": lambda g: 1e18 * g / g.abs().max(),
}


@pytest.mark.parametrize(("name", "kind"), [row(n, k) for n in FAMILY for k in EXTREME if not (n in KL and k == "1e18")])
def test_extreme_gradients_leave_everything_finite(name, kind):
    """In float32: from the first on, from the second on, and once.

    The KL rules average ``g^2 / d``. With ``d`` down to ``eps`` it is 1e44 for gradients of 1e18, which float32 does not hold.
    """
    usual, start = stream((5, 6), 12, torch.float32), normal(5, 6, seed=1, dtype=torch.float32)
    extreme = [EXTREME[kind](g) for g in usual]
    for grads in (extreme, [usual[0], *extreme[1:]], [*usual[:5], extreme[5], *usual[6:]]):
        param, optimizer = trained(name, start, grads, {"eps": 1e-8, "precondition_frequency": 1})
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        assert [slot for slot, t in {"param": param, **state}.items() if not t.isfinite().all()] == []
