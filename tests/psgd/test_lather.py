"""LATHER against its float64 oracle, against Adam, and what its refresh keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from core.kit import normal
from core.plain import plain
from psgd.family import OPTIONS_OF, drawn, probes, problem, relative
from reference.lather import lather

import hbcore
from hb_psgd import LATHER
from hb_psgd.factor_rules import RULES
from hb_psgd.lather import AdamInEigenbasis
from hbcore.api import bases

DYNAMIC = {"betas": (0.9, 0.999), "eps": 1e-8, "precond_lr": 0.1, "lower_bound_beta": 0.9, "dampening": 1e-9}
DYNAMIC |= {"precond_init_scale_scale": 1.0}


def train(param, gradients, **options):
    given = {**OPTIONS_OF, **options}
    chain = lambda h: LATHER.chain(SimpleNamespace(**{**given, **{n: getattr(h, n) for n in DYNAMIC}}))  # noqa: E731
    return plain(chain, {"lr": 0.01, **DYNAMIC}, param, gradients, probes=probes)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("probability", [1, 0.3])
@pytest.mark.parametrize("shape", [(5, 5), (4, 5)], ids=str)
def test_it_agrees_with_the_oracle_over_thirty_steps(rule, probability, shape):
    param, gradients = problem(shape, steps=30)
    ours, _ = train(param, gradients, precond_rule=rule, preconditioner_update_probability=probability)
    counter = iter(range(10**6))
    theirs = lather(
        param.numpy(), [g.numpy() for g in gradients], rule=rule, draw=lambda shape: drawn(next(counter), shape),
        probability=lambda k: float(probability),
    )  # fmt: skip
    assert relative(ours - param, theirs - param.numpy()) < 1e-8


def engine(name, params, gradients, **options):
    optimizer = hbcore.get(name)(params, lr=0.01, betas=(0.9, 0.999), compile="eager", update_clipping=None, **options)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return optimizer


SHAPES = ((6, 4), (5, 5), (3, 4, 2), (7,), ())


def parameters():
    return [torch.nn.Parameter(normal(*s, seed=i)) for i, s in enumerate(SHAPES)]


def identity(p):
    return torch.eye(p.shape[-1], dtype=p.dtype).expand_as(p).clone()


def test_it_equals_adam_exactly_where_its_basis_is_the_identity(monkeypatch):
    monkeypatch.setattr(bases, "eigenbasis", identity)
    monkeypatch.setattr(bases, "all_refreshed", lambda pairs, *_: [identity(p) for p, _ in pairs])
    gradients = [[normal(*s, seed=10 * step + i) for i, s in enumerate(SHAPES)] for step in range(12)]
    ours, adam = parameters(), parameters()
    engine("LATHER", ours, gradients)
    engine("Adam", adam[:3], [step[:3] for step in gradients[1:]])  # the first gradient only prepares matrices
    engine("Adam", adam[3:], [step[3:] for step in gradients])
    for p, q in zip(ours, adam, strict=True):
        assert torch.equal(p, q)


def test_bases_stay_orthonormal_and_diagonalize_p():
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(8, 6))
    scale = torch.logspace(0, -1, 8)[:, None] * torch.logspace(0, -1, 6)
    optimizer = engine("LATHER", [p], [[scale * torch.randn(8, 6, generator=generator)] for _ in range(150)])
    for i, n in ((0, 8), (1, 6)):
        q, b = optimizer.state[p][f"Q_{i}"], optimizer.state[p][f"B_{i}"]
        assert torch.linalg.matrix_norm(b.mT @ b - torch.eye(n), float("inf")) < 1e-5
        inner = b.mT @ q.mT @ q @ b
        off = inner - torch.diag(inner.diagonal())
        assert off.norm() < 0.2 * inner.norm()


def test_a_zero_first_gradient_does_not_stop_it():
    p = torch.nn.Parameter(torch.zeros(4, 3))
    gradients = [[torch.zeros(4, 3)]] * 2 + [[normal(4, 3, seed=s, dtype=torch.float32)] for s in range(20)]
    optimizer = engine("LATHER", [p], gradients)
    assert all(t.isfinite().all() for t in optimizer.state[p].values())
    assert float(optimizer.state[p]["init_scale"]) > 0 and float(p.detach().abs().max()) > 0.01


def test_it_takes_what_has_a_dense_factor():
    rule = AdamInEigenbasis()
    assert [rule.takes(torch.empty(s)) for s in ((3, 2), (3, 1), (3,), (), (2, 2, 2))] == [True, False, False, False, True]
    assert not AdamInEigenbasis(memory_save_mode="all_diag").takes(torch.empty(3, 2))
    assert AdamInEigenbasis(min_ndim_triangular=1).takes(torch.empty(3))
