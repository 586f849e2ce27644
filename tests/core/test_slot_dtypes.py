"""Slots with a dtype of their own: what is stored, how it is rounded, and that everything which handles state keeps to it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from core.kit import same
from core.rules import matrix, optimizer_with, parameter, rule, stepped

from hbcore.api import Slot, zeros
from hbcore.errors import RuleError, StateWarning
from hbcore.introspect import describe

BF16 = torch.bfloat16
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STEP = 2.0**-10
"""An eighth of the distance between 1 and the next bfloat16; float16 has it exactly."""


def growing(self, u, s, c):
    """``q`` grows by :data:`STEP`; the update is what it was."""
    return s["q"] * 1, {"q": s["q"] + STEP}


def slots(dtype, fill=1.0):
    return lambda self, param: {"q": Slot(param.shape, fill, dtype=dtype), "m": zeros(param)}


def grower(dtype=BF16, update=growing, **attributes):
    return matrix(update, slots(dtype), **attributes)


def trained(*shapes, dtype=BF16, steps=1, params=None, made=None, **options):
    params = params or [parameter(*shape) for shape in shapes]
    optimizer = stepped(made or grower(dtype), *params, steps=steps, compile="eager", **options)
    return optimizer, params


def qs(optimizer, params):
    return [optimizer.state[p]["q"].clone() for p in params]


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slot_is_stored_in_its_dtype_and_read_in_the_compute_dtype(dtype, of):
    heard = []

    def update(self, u, s, c):
        heard.append(s["q"].dtype)
        return growing(self, u, s, c)

    params = [torch.nn.Parameter(torch.ones(4, 3, dtype=of)) for _ in range(2)]
    for options in ({}, {"storage_dtype": "bfloat16"}, {"ecc": "bf16+8"}):
        optimizer, _ = trained(params=params, made=grower(dtype, update), **options)
        assert all(optimizer.state[p]["q"].dtype == dtype for p in params)
        assert all(entry["q"].dtype == dtype for entry in optimizer.state_dict()["state"].values())
    assert set(heard) == {torch.float64 if of == torch.float64 else torch.float32}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slot_begins_with_its_fill_rounded_to_nearest(dtype):
    optimizer = optimizer_with(lambda h: (matrix(slots=slots(dtype, 1 + STEP))(h.beta),))([p := parameter(4, 3)])
    wanted = torch.full((4, 3), 1 + STEP).to(dtype)
    assert torch.equal(optimizer.state_dict()["state"][0]["q"], wanted)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["q"], wanted)


def test_bfloat16_is_rounded_to_its_neighbours_with_the_right_mean():
    optimizer, [p] = trained((200, 300), steps=1)
    [q] = qs(optimizer, [p])
    assert {*q.unique().tolist()} == {1.0, 1.0 + 2.0**-7}
    share, n = float((q > 1).float().mean()), q.numel()
    assert abs(share - 1 / 8) < 6 * (7 / 64 / n) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_other_dtypes_are_rounded_to_nearest(dtype):
    def update(self, u, s, c):
        return u, {"q": s["q"] + 2.0**-12 * 1.5}

    optimizer, [p] = trained((5, 4), made=grower(dtype, update))
    assert torch.equal(optimizer.state[p]["q"], torch.full((5, 4), 1 + 2.0**-12 * 1.5).to(dtype))


def test_what_a_slot_can_hold_is_kept_as_it_is():
    def update(self, u, s, c):
        return u, {"q": s["q"] * 3 - 2 + c.step}

    optimizer, [p] = trained((5, 4), steps=3, made=grower(BF16, update))
    assert torch.equal(optimizer.state[p]["q"], torch.full((5, 4), 19.0, dtype=BF16))


def test_rounding_depends_on_seed_name_and_step_and_nothing_else():
    shapes = [(40, 30)] * 3
    usual = qs(*trained(*shapes))
    assert len({int(q.view(torch.int16).sum()) for q in usual}) == 3
    assert same(qs(*trained(*shapes, multi_tensor=False)), usual)
    assert same(qs(*trained(*shapes, stochastic_rounding=True)), usual)
    assert not any(map(torch.equal, qs(*trained(*shapes, seed=5)), usual))
    unequal = matrix(lambda self, u, s, c: (u, {"q": s["q"] * 0 + 1 + STEP}), slots(BF16))
    once, twice = qs(*trained(*shapes, made=unequal)), qs(*trained(*shapes, made=unequal, steps=2))
    assert same(once, usual) and not any(map(torch.equal, twice, usual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_run_without_the_others_are_rounded_as_with_them(dtype):
    params = [parameter(40, 30) for _ in range(3)]
    optimizer = optimizer_with(lambda h: (grower(dtype)(h.beta),))(params, compile="eager")
    whole, _ = trained(params=[parameter(40, 30) for _ in range(3)], dtype=dtype, steps=3)
    for some in (params, params[1:], params[:1], params):  # each takes three steps
        for p in params:
            p.grad = torch.ones_like(p) if any(p is q for q in some) else None
        optimizer.step()
    assert same(qs(optimizer, params), qs(whole, whole.core.groups[0]["params"]))


def through_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def replaced(optimizer):
    for entry in optimizer.state.values():
        entry["q"] = entry["q"].clone()
    return optimizer


def swapped(optimizer):
    for entry in optimizer.state.values():
        entry["q"].data = entry["q"].clone()
    return optimizer


def loaded(optimizer):
    other = type(optimizer)(optimizer.core.groups[0]["params"], compile="eager")
    other.load_state_dict(through_file(optimizer.state_dict()))
    return other


def reloaded(optimizer):
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    return optimizer


INTERRUPTIONS = {"replaced": replaced, "swapped": swapped, "loaded": loaded, "loaded in place": reloaded}


def steps(optimizer, count):
    params = optimizer.core.groups[0]["params"]
    for _ in range(count):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return [t for p in params for t in (p.detach().clone(), optimizer.state[p]["q"].clone())]


def fresh(dtype=BF16):
    made = grower(dtype)
    return optimizer_with(lambda h: (made(h.beta),))([parameter(20, 30), parameter(20, 30), parameter(7, 5)], compile="eager")


@pytest.mark.parametrize("how", INTERRUPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_goes_on_as_if_nobody_had_touched_the_state(dtype, how):
    straight, optimizer = fresh(dtype), fresh(dtype)
    wanted = steps(straight, 6)
    steps(optimizer, 3)
    assert same(steps(INTERRUPTIONS[how](optimizer), 3), wanted)


def test_copies_have_the_slots_dtype():
    optimizer = fresh()
    steps(optimizer, 2)
    copied = copy.deepcopy(optimizer)
    assert all(entry["q"].dtype == BF16 for entry in copied.state.values())
    assert same(steps(copied, 2), steps(optimizer, 2))


@pytest.mark.parametrize(("saved", "here"), [(torch.float32, BF16), (BF16, torch.float32), (torch.float16, BF16)], ids=str)
def test_a_checkpoint_in_another_dtype_is_converted_with_a_note(saved, here):
    before, after = fresh(saved), fresh(here)
    steps(before, 3)
    state = before.state_dict()
    with pytest.warns(StateWarning, match=rf"'q' was saved as {saved} and is converted to {here}"):
        after.load_state_dict(state)
    for i, p in enumerate(after.core.groups[0]["params"]):
        assert torch.equal(after.state[p]["q"], state["state"][i]["q"].to(here))


def test_the_dry_step_of_distributed_checkpoints_allocates_it():
    optimizer = optimizer_with(lambda h: (grower()(h.beta),))([p := parameter(4, 3)], lr=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["q"], torch.ones(4, 3, dtype=BF16)) and optimizer.state[p]["step"] == 0


def test_a_skipped_step_keeps_it():
    params = [parameter(20, 30), parameter(20, 30)]
    optimizer, _ = trained(params=params, skip_nonfinite=True)
    before = qs(optimizer, params)
    for p in params:
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    assert same(qs(optimizer, params), before)


def test_its_bytes_are_described():
    cls = optimizer_with(lambda h: (grower(BF16)(h.beta),))
    found = {slot["name"]: (slot["dtype"], slot["bytes_per_parameter"]) for slot in describe(cls)["slots"]}
    assert found == {"q": ("bfloat16", 2.0), "m": ("float32", 4.0)}
    assert describe(cls)["bytes_per_parameter"] == 6


REFUSED = {
    "an integer": (grower(torch.int32), r"the slot 'q' has dtype torch.int32; pass one of torch.bfloat16, .*, or None"),
    "a text": (grower("bfloat16"), r"the slot 'q' has dtype 'bfloat16'; pass one of"),
    "eight bits": (grower(torch.float8_e4m3fn), r"the slot 'q' has dtype torch.float8_e4m3fn; pass one of"),
    "an elementwise rule": (rule(growing, slots(BF16)), r"the slot 'q' has dtype=torch.bfloat16, which is for .*Domain.MATRIX"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_an_error(what):
    made, words = REFUSED[what]
    with pytest.raises(RuleError, match=rf"{__file__}:\d+: rule 'toy' .ToyRule.slots.*{words}"):
        stepped(made, parameter(4, 3))
