"""Hessian-vector products on two processes."""

from __future__ import annotations

import pytest
import torch
from core.kit import distance, same
from core.newton import derivatives, loss_of, network
from distributed import newton_jobs
from distributed.ranks import on_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ranks_have_the_products_of_the_whole_batch(how):
    """Differentiating twice would give each rank those of its own part: they take finite differences, which are averaged."""
    first, second = on_ranks(2, newton_jobs.follow, 2, how)
    assert first["calls"] == second["calls"] == 2
    assert all(same(first[name], second[name]) for name in ("vector", "product", "found", "params"))
    model, alone = network(torch.float64), newton_jobs.follow(0, 1, "alone", finite_differences=True)
    assert distance(first["vector"], alone["vector"]) < 1e-6
    assert distance(first["product"], derivatives(loss_of(model), list(model.parameters()), first["vector"])[1]) < 1e-6
    assert same(first["found"], [p.detach() for p in model.parameters()])  # restored bit for bit
    assert distance(first["params"], alone["params"]) < 1e-12


def test_one_process_differentiates_twice():
    assert newton_jobs.follow(0, 1, "alone")["calls"] == 1


def test_every_rank_says_what_is_missing():
    """Also one without a row of a parameter, which would wait for the others otherwise."""
    for said in on_ranks(2, newton_jobs.refused, False, {}):
        assert "needs Hessian-vector products in this step: call step(closure)" in said
    for said in on_ranks(2, newton_jobs.refused, True, {"fallback": False}):
        assert "each of 2 ranks would differentiate its own batch twice" in said
    assert on_ranks(2, newton_jobs.refused, True, {"finite_differences": True}) == ["", ""]
