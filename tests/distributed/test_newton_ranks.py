"""Hessian-vector products on two processes."""

from __future__ import annotations

import pytest
import torch
from core.kit import distance, same
from core.newton import derivatives, loss_of, network
from distributed import newton_jobs
from distributed.ranks import on_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def test_ranks_have_the_products_of_the_whole_batch():
    """Differentiating twice would give each rank those of its own part: they take finite differences, which are averaged."""
    (vectors, products, calls), (others, also, _) = on_ranks(2, newton_jobs.follow, 2)
    assert calls == 2
    assert same(vectors, others)
    assert same(products, also)
    model = network(torch.float64)
    assert distance(products, derivatives(loss_of(model), list(model.parameters()), vectors)[1]) < 1e-6
    *_, calls = newton_jobs.follow(0, 1)
    assert calls == 1


def test_sharded_parameters_are_refused_on_every_rank():
    for said in on_ranks(2, newton_jobs.sharded):
        assert "parameter '0.weight' of group 0, shape (8, 4), is sharded over ranks; Hessian-vector products need" in said
