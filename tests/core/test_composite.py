"""A composite's own state beside its children's: saved, and given back as it was."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from core.kit import gradients, parameters, run, same
from distributed import jobs
from distributed.ranks import on_ranks

import hbcore
from hbcore import CheckpointError, SplitOpt
from hbcore.api import Composite

EAGER = {"lr": 0.02, "compile": "eager"}
BASES = [n for n in hbcore.list_optimizers() if not {"closure", "sparse"} & set(hbcore.info(n).spec.capabilities)]


class Lookahead(Composite):
    """Zhang et al. 2019: slow weights that follow the fast ones every k steps. It counts in its groups."""

    def __init__(self, params, base="AdamW", k=2, alpha=0.5, **options):
        super().__init__([hbcore.get(base)(params, **options)])
        self.k, self.alpha = k, alpha

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        old = {p: p.detach().clone() for p in params if "slow" not in self.state.get(p, {})}
        loss = super().step(closure)
        taken = self.param_groups[0]["taken"] = self.param_groups[0].get("taken", 0) + 1
        for p in params:
            if p in old:
                self.state[p].update(
                    {"slow": old[p], "about": {"alpha": self.alpha}, "origin": torch.tensor(0.1, dtype=torch.float64)}
                )
            if taken % self.k == 0:
                p.copy_(self.state[p]["slow"].lerp_(p, self.alpha))
        return loss


def resumed(saved, params, base="AdamW", **options):
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = Lookahead(copies, base, **{**EAGER, **options})
    optimizer.load_state_dict(saved)
    return copies, optimizer


def through_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:MuonAdamW. the parameters have no names")
@pytest.mark.filterwarnings("ignore:AdamC:UserWarning")
@pytest.mark.parametrize("base", BASES)
def test_state_of_its_own_resumes_exactly_around_any_optimizer(base):
    params = parameters()
    optimizer = Lookahead(params, base, **EAGER)
    steps = list(gradients(6))
    run(optimizer, params, steps[:3])
    saved = through_file(optimizer.state_dict())
    copies, other = resumed(saved, params, base)
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(other.state[q]["slow"], optimizer.state[p]["slow"])
        assert other.state[q]["slow"].stride() == optimizer.state[p]["slow"].stride()
        assert other.state[q]["origin"].dtype == torch.float64
        assert other.state[q]["about"] == {"alpha": 0.5}
    for opt, mine in ((optimizer, params), (other, copies)):
        run(opt, mine, steps[3:])
    assert same(copies, params)
    other.load_state_dict(saved)  # over what it has, too
    assert torch.equal(other.state[copies[0]]["slow"], saved["state"][0]["slow"])


@pytest.mark.parametrize("options", [{"ecc": "bf16+8"}, {"mars": True, "use_ema": True}], ids=str)
def test_it_resumes_exactly_whatever_the_options(options):
    params = parameters()
    optimizer = Lookahead(params, **EAGER, **options)
    steps = list(gradients(6))
    run(optimizer, params, steps[:3])
    copies, other = resumed(copy.deepcopy(optimizer.state_dict()), params, **options)
    for opt, mine in ((optimizer, params), (other, copies)):
        run(opt, mine, steps[3:])
    assert same(copies, params)


def test_complex_and_frozen_parameters_have_it_too():
    z = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = Lookahead([z, frozen], **EAGER)
    run(optimizer, [z], [[torch.randn(3, 2, dtype=torch.complex64)] for _ in range(3)])
    optimizer.state[frozen]["slow"] = torch.full((2,), 3.0)
    saved = through_file(optimizer.state_dict())
    other = Lookahead(params := [torch.nn.Parameter(z.detach().clone()), torch.nn.Parameter(torch.ones(2))], **EAGER)
    other.load_state_dict(saved)
    assert torch.equal(other.state[params[0]]["slow"], optimizer.state[z]["slow"])
    assert torch.equal(other.state[params[1]]["slow"], torch.full((2,), 3.0))


def test_a_split_optimizer_keeps_what_its_user_put_there():
    params = parameters()

    def build(ps):
        return SplitOpt([{"params": ps[:1], "optimizer": "AdamW"}, {"params": ps[1:], "optimizer": "SGD"}], **EAGER)

    optimizer = build(params)
    run(optimizer, params, gradients(2))
    for i, p in enumerate(params):
        optimizer.state[p]["mine"] = torch.full(p.shape, float(i))
    other = build(copies := [torch.nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert all(torch.equal(other.state[p]["mine"], torch.full(p.shape, float(i))) for i, p in enumerate(copies))


@pytest.mark.filterwarnings("ignore:state '(about|origin)'")
def test_what_nobody_said_was_its_own_is_refused():
    params = parameters()
    optimizer = Lookahead(params, **EAGER)
    run(optimizer, params, gradients(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["stray"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="state 'stray' in the checkpoint, which no rule here uses"):
        resumed(saved, params)
    del saved["state"][0]["stray"]
    with pytest.raises(CheckpointError, match="state 'slow' in the checkpoint, which no rule here uses"):
        hbcore.get("AdamW")(params, **EAGER).load_state_dict(saved)
    with pytest.warns(hbcore.StateWarning, match="'slow'"):
        hbcore.get("AdamW")(params, **EAGER).load_state_dict(saved, strict=False)


def on_shards(rank):
    """The slow weights of a resumed optimizer, whole, and the parameters of both after three more steps."""
    model, _ = jobs.build("AdamW", {}, "fsdp")
    optimizer = Lookahead(model.named_parameters(), **EAGER)
    jobs.train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "slow": saved["state"][0]["slow"].full_tensor()}  # as one process saved it
    second, _ = jobs.build("AdamW", {}, "fsdp")
    for p, q in zip(model.parameters(), second.parameters(), strict=True):
        q.data.copy_(p.data)
    other = Lookahead(second.named_parameters(), **EAGER)
    other.load_state_dict(saved)
    whole = [state["slow"].full_tensor() for state in other.state.values()]
    for m, o in ((model, optimizer), (second, other)):
        jobs.train(m, o, range(3, 6))
    return whole, jobs.whole(model), jobs.whole(second)


def test_it_is_sharded_like_its_parameter():
    model, _ = jobs.build("AdamW", {}, "alone")
    optimizer = Lookahead(model.named_parameters(), **EAGER)
    jobs.train(model, optimizer, range(3))
    for whole, straight, second in on_ranks(2, on_shards):
        assert same([straight[k] for k in straight], [second[k] for k in straight])
        torch.testing.assert_close(whole, [optimizer.state[p]["slow"] for p in model.parameters()])
