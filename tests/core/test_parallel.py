"""Branches of a chain: each sees the same update, keeps its own state, and a merge makes one update of theirs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core.kit import combined, gradients, parameters, run, same, values
from core.rules import matrix, optimizer_with
from core.rules import rule as elementwise

import hbcore
from hb_adam import AdamW
from hb_adam.lion import ScaleByLion
from hb_muon.rules import Orthogonalize
from hb_soap import PreconditionBySOAP
from hbcore import Parallel, RuleError, graft
from hbcore.api import Optimizer, Route, ScaleByAdam, is_matrix, zeros

SHAPES = ((6, 4), (5,), ())


def mean(updates, c):
    return sum(updates) / len(updates)


def optimizer_class(*branches, merge=graft):
    class Mixed(Optimizer):
        def __init__(self, params, lr=0.01, betas=(0.9, 0.99), eps=1e-8, **options):
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, options)

        @staticmethod
        def chain(h):
            return (Parallel(tuple(tuple(t(h) for t in branch) for branch in branches), merge),)

    return Mixed


def adam_(h):
    return ScaleByAdam(h.betas, h.eps)


def lion_(h):
    return ScaleByLion(h.betas)


def orthogonal(h):
    return Orthogonalize(h.eps, method="exact")


@pytest.mark.parametrize(("backend",), combined(["eager", "cpp", "inductor", "triton"]))
def test_graft_has_the_size_of_one_and_the_direction_of_the_other(backend):
    params = parameters(SHAPES, torch.float64)
    start = values(params)
    steps = list(gradients(6, SHAPES, torch.float64))
    Mixed = optimizer_class([adam_], [lion_])
    run(Mixed(params, compile=backend), params, steps)
    b1, b2 = 0.9, 0.99
    for i, p in enumerate(params):
        w, m, v, e = start[i].numpy().copy(), 0.0, 0.0, 0.0
        for t, grads in enumerate(steps, 1):
            g = grads[i].numpy()
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            size = (m / (1 - b1**t)) / np.maximum(np.sqrt(v / (1 - b2**t)), 1e-8)
            direction = np.sign(b1 * e + (1 - b1) * g)
            e = b2 * e + (1 - b2) * g
            norm = np.linalg.norm(direction)
            w = w - 0.01 * (direction * np.linalg.norm(size) / norm if norm else 0 * direction)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-11, atol=1e-13)


def test_branches_keep_their_own_state_under_their_own_names():
    params = parameters(SHAPES)
    optimizer = optimizer_class([adam_], [adam_], merge=mean)(params)
    plain_params = parameters(SHAPES)
    run(optimizer, params, gradients(5, SHAPES))
    run(AdamW(plain_params, lr=0.01), plain_params, gradients(5, SHAPES))
    state = optimizer.state[params[0]]
    assert {"branch0.exp_avg", "branch1.exp_avg", "branch0.exp_avg_sq", "branch1.exp_avg_sq"} < set(state)
    assert same(params, plain_params)  # the mean of two equal branches


def test_it_is_one_program_and_checkpoints():
    params = parameters(SHAPES)
    optimizer = optimizer_class([adam_], [lion_], merge=mean)(params, compile="eager")
    run(optimizer, params, gradients(3, SHAPES))
    assert optimizer.report.programs == 1
    other_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = optimizer_class([adam_], [lion_], merge=mean)(other_params, compile="eager")
    other.load_state_dict(optimizer.state_dict())
    more = list(gradients(2, SHAPES))
    run(optimizer, params, more)
    run(other, other_params, more)
    assert same(params, other_params)


def test_a_matrix_rule_may_be_one_of_them():
    class Grafted(Optimizer):
        def __init__(self, params, lr=0.01, betas=(0.9, 0.99), eps=1e-8, **options):
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps}, options)

        @staticmethod
        def chain(h):
            adam_rule = ScaleByAdam(h.betas, h.eps)
            return (Route(is_matrix, (Parallel(((adam_rule,), (Orthogonalize(h.eps, method="exact"),))),), (adam_rule,)),)

    params = parameters(((6, 4), (5,)), torch.float64)
    start = values(params)
    [grads] = gradients(1, ((6, 4), (5,)), torch.float64)
    run(Grafted(params), params, [grads])
    g = grads[0].numpy()
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    size = np.linalg.norm(g / np.maximum(np.abs(g), 1e-8))  # Adam's first step is the sign
    factor = u @ vt
    np.testing.assert_allclose(
        params[0].detach().numpy(), start[0].numpy() - 0.01 * factor * size / np.linalg.norm(factor), rtol=1e-9, atol=1e-12
    )


def written_at_once(self, u, s, c):
    """Twice the update, in its own memory where it has some."""
    place = c.into("update")
    return 2 * u if place is None else place.mul_(2), {"m": s["m"] + 1}


def counted(self, stacks):
    return [{"turns": s["turns"] + s["m"]} for s, _ in stacks]


def slots_with_turns(self, param):
    return {"m": zeros(param), "turns": zeros(param)}


def test_a_branch_writes_over_nothing_that_another_reads_and_has_its_refreshes():
    rule = matrix(written_at_once, slots_with_turns, refresh=counted, rate=lambda self, k: 0.5)
    plain = elementwise(lambda self, u, s, c: (u, {}), lambda self, param: {})
    made = lambda h: (Parallel(((rule(h.beta),), (plain(h.beta),)), merge=lambda updates, c: updates[0] + updates[1]),)  # noqa: E731
    p = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = optimizer_with(made)([p], lr=1.0)
    for _ in range(4):
        p.grad = torch.ones(4, 3)
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((4, 3), -12.0))
    assert torch.equal(optimizer.state[p]["branch0.turns"], torch.full((4, 3), 2.0 + 4.0))  # after the second and fourth step


def test_what_no_branch_can_have_is_refused():
    adam_rule = ScaleByAdam()
    with pytest.raises(RuleError, match="takes two or more"):
        Parallel(((adam_rule,),))
    with pytest.raises(RuleError, match="one matrix rule"):
        Parallel(((Orthogonalize(),), (Orthogonalize(),)))
    with pytest.raises(RuleError, match="primes, or is flat"):
        Parallel(((adam_rule,), (PreconditionBySOAP(),)))
    with pytest.raises(RuleError, match="put a Route around"):
        Parallel(((adam_rule,), (Route(is_matrix, (adam_rule,)),)))


def test_its_old_name():
    assert hbcore.get("Parallel") is Parallel
    with pytest.warns(FutureWarning, match="Branch is now Parallel"):
        hbcore.registry.Registry().get("Branch")
