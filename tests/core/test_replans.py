"""What happens around a step: parameters and groups that are exchanged, steps that fail, memory that is let go."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hb_adam import AdamW, SFAdamW
from hb_muon import Muon
from hbcore.api import Block, Context, Domain, Optimizer, Slot, State, Transform, matrix_view, zeros
from hbcore.errors import RuleError


def param(*shape):
    return nn.Parameter(torch.ones(shape))


def step(optimizer, *params):
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize("cls", [AdamW, Muon])
def test_a_parameter_whose_memory_is_exchanged_trains_on(cls):
    p, q = param(4, 4), param(4, 4)
    ours, plain = cls([p], compile="eager"), cls([q], compile="eager")
    for k in range(4):
        if k == 2:
            p.data = p.data.clone()
        step(ours, p)
        step(plain, q)
    assert torch.equal(p, q)


def test_a_parameter_put_in_the_place_of_another_is_trained_and_the_other_let_go():
    a, b, c = param(3), param(3), param(3)
    optimizer = AdamW([a, b], compile="eager")
    step(optimizer, a)
    optimizer.param_groups[0]["params"][1] = c
    step(optimizer, a, c)
    assert not torch.equal(c, torch.ones(3))
    gone = weakref.ref(a)
    optimizer.state.pop(a)
    optimizer.param_groups[0]["params"][0] = b
    del a
    step(optimizer, b, c)
    gc.collect()
    assert gone() is None


def test_parameters_that_change_places_between_groups_take_their_new_groups_numbers():
    a, b = param(3), param(3)
    optimizer = AdamW([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.0}], compile="eager")
    step(optimizer, a, b)
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = [b], [a]
    before = a.detach().clone()
    step(optimizer, a, b)
    assert torch.equal(a, before) and not torch.equal(b, torch.ones(3))


def test_a_parameter_that_was_empty_is_trained_once_it_is_not():
    a, b = param(3), param(0)
    optimizer = AdamW([a, b], compile="eager")
    step(optimizer, a)
    b.data = torch.ones(3)
    step(optimizer, a, b)
    assert not torch.equal(b, torch.ones(3))


def test_a_step_that_fails_to_plan_fails_again_and_keeps_no_gradients():
    w = param(4, 4)
    optimizer = Muon([w], compile="eager")
    step(optimizer, w)
    optimizer.param_groups[0]["split_sizes"] = [3, 3]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\(3, 3\)"):
            step(optimizer, w)
    optimizer.param_groups[0]["split_sizes"] = [2, 2]
    step(optimizer, w)


def test_autograd_knows_that_a_step_changed_the_parameters():
    p = param(3)
    loss = (p**2).sum() * p.sum()
    step(AdamW([p], compile="eager"), p)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@dataclass(frozen=True)
class Remembering(Transform):
    """Returns its own input among the slots, and an old slot under another name: what aliases must not be overwritten."""

    name = "remembering"
    domain = Domain.MATRIX

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return matrix_view(shape)

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"last": zeros(param), "before": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return 2 * u - c.mean(u), {"last": u, "before": s["last"]}


class Remember(Optimizer):
    def __init__(self, params: Any, lr: float = 1.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Remembering(),)


def test_a_matrix_rule_may_return_what_it_was_given():
    p = param(2, 2)
    optimizer = Remember([p], compile="eager")
    for g in (1.0, 3.0):
        p.grad = torch.full((2, 2), g)
        optimizer.step()
    assert torch.equal(optimizer.state[p]["last"], torch.full((2, 2), 3.0))
    assert torch.equal(optimizer.state[p]["before"], torch.full((2, 2), 1.0))


def test_scalars_in_one_slab_do_not_see_each_other():
    a, b = param(), param()
    optimizer = Remember([a, b], compile="eager")
    a.grad, b.grad = torch.tensor(1.0), torch.tensor(5.0)
    optimizer.step()
    assert (a.item(), b.item()) == (0.0, -4.0)


def test_averages_and_modes_do_not_mix():
    p = param(3)
    optimizer = SFAdamW([p], use_ema=True, compile="eager")
    step(optimizer, p)
    with optimizer.ema_weights():
        with pytest.raises(RuleError, match="outside"):
            optimizer.eval()
        with pytest.raises(RuleError, match="already"), optimizer.ema_weights():
            pass


@dataclass(frozen=True)
class Mirrored(Transform):
    """Evaluates at the negated weights and counts its swaps in a slot: a swap that changes more than the weights."""

    lr: float = 1.0
    name = "mirrored"
    stage = "apply"
    owns_apply = True

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {"swaps": zeros(param)}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return c.param - u, {"swaps": s["swaps"] + 0.0}

    def swap(self, param: Tensor, s: State, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return -param, {"swaps": s["swaps"] + 1}


class Mirror(Optimizer):
    def __init__(self, params: Any, lr: float = 1.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, options)

    @staticmethod
    def chain(h: Any) -> tuple[Transform, ...]:
        return (Mirrored(),)


def test_a_swap_that_changes_slots_changes_them_once():
    p = nn.Parameter(torch.full((3,), 3.0))
    optimizer = Mirror([p], compile="eager")
    step(optimizer, p)
    for training, swaps in ((False, 1), (True, 2), (True, 2), (False, 3)):
        optimizer.train(training)
        assert torch.equal(p, torch.full((3,), 2.0 if training else -2.0))
        assert torch.equal(optimizer.state[p]["swaps"], torch.full((3,), float(swaps)))
