"""A rule that cannot be fused is refused on shards, where each rank would run it on its own part."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from core.rules import optimizer_with, rule
from distributed import jobs
from distributed.ranks import on_ranks

from hbcore.errors import RuleError

UPDATES = {
    "sum": lambda self, u, s, c: (u / (1 + u.sum().abs()), {"m": s["m"]}),
    "item": lambda self, u, s, c: (u * u.abs().max().item(), {"m": s["m"]}),
    "sort": lambda self, u, s, c: (torch.sort(u.flatten())[0].view_as(u), {"m": s["m"]}),
    "cumsum": lambda self, u, s, c: (u.cumsum(0), {"m": s["m"]}),
    "undeclared": lambda self, u, s, c: (u / (1 + c.norm(u)), {"m": s["m"]}),
    "branch, then sum": lambda self, u, s, c: (u / (math.sqrt(self.beta) + u.sum().abs()), {"m": s["m"]}),
}


def refused(rank: int, what: str, how: str) -> str:
    """What the first step says; the parameters must be as they were."""
    made = rule(UPDATES[what])
    model, _ = jobs.build("AdamW", {}, how)
    optimizer = optimizer_with(lambda h: (made(h.beta),))(model.parameters())
    before = jobs.whole(model)
    try:
        jobs.train(model, optimizer, range(1))
    except RuleError as error:
        assert all(torch.equal(p, before[n]) for n, p in jobs.whole(model).items())
        return str(error)
    return "ran"


@pytest.mark.parametrize("what", UPDATES)
def test_a_rule_that_cannot_be_fused_is_refused_on_shards(what: Any) -> None:
    for said in on_ranks(2, refused, what, "fsdp"):
        assert f"{__file__}:" in said and "rule 'toy' (ToyRule)" in said and "sharded" in said
