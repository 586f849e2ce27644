"""What everyone may expect of a torch.optim.Optimizer: groups, names, hooks, closures, scalers, copies, lifetimes."""

from __future__ import annotations

import collections
import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from core.kit import (
    SHAPES,
    backward,
    combined,
    copy_gradients,
    distance,
    gradients,
    loss_of,
    mlp,
    parameters,
    run,
    same,
    train,
    values,
)
from rounding import drift
from torch import nn

from hb_adam import SGD, AdamW


class Own(AdamW):
    """A subclass as a user writes one."""


def preset_init(self, params, **options):
    AdamW.__init__(self, params, **{"caution": True, **options})


Preset = type("Preset", (AdamW,), {"__init__": preset_init, "__module__": __name__})


def test_the_quick_start():
    from hbcore import AdamW

    model = mlp()
    opt = AdamW(model.parameters(), lr=1e-3)
    before = float(loss_of(model, 0))
    for _ in range(20):
        loss = loss_of(model, 0)
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert float(loss_of(model, 0)) < before


# --- groups and names -------------------------------------------------------------------------------------------------


def test_a_group_added_midway_starts_at_step_one_and_disturbs_nobody():
    params = parameters()
    alone, alone_late = parameters(), parameters()
    optimizer = AdamW(params[:2], weight_decay=0.1, compile="eager")
    steps = list(gradients(10))
    for count, grads in enumerate(steps):
        if count == 4:
            optimizer.add_param_group({"params": params[2:], "lr": 0.1})
        run(optimizer, params[: 2 if count < 4 else None], [grads[: 2 if count < 4 else None]])
    run(AdamW(alone[:2], weight_decay=0.1, compile="eager"), alone[:2], [g[:2] for g in steps])
    run(AdamW(alone_late[2:], weight_decay=0.1, lr=0.1, compile="eager"), alone_late[2:], [g[2:] for g in steps[4:]])
    assert same(params, alone[:2] + alone_late[2:])
    assert [int(optimizer.state[p]["step"]) for p in params] == [10, 10, 6, 6, 6]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.99)


def test_several_groups_equal_one_group():
    one, several = parameters(), parameters()
    run(AdamW(one, compile="eager"), one, gradients(5))
    run(AdamW([{"params": [p]} for p in several], compile="eager"), several, gradients(5))
    assert distance(one, several) < drift(torch.float32, 5)  # packed otherwise, so rounded otherwise on some processors


@pytest.mark.parametrize(
    ("caution", "backend"), combined([False, True], ["eager", "inductor"], compiled=[(False, "inductor")]), ids=str
)
def test_one_at_a_time_equals_all_together(caution, backend):
    shapes, options = SHAPES[:2], {"caution": caution, "weight_decay": 0.1}
    together, alone = parameters(shapes), parameters(shapes)
    run(AdamW(together, compile=backend, **options), together, gradients(5, shapes))
    run(AdamW(alone, compile=backend, multi_tensor=False, **options), alone, gradients(5, shapes))
    assert distance(together, alone) < drift(torch.float32, 5)


def test_named_parameters_are_kept():
    model = mlp()
    optimizer = AdamW(model.named_parameters())
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    train(model, optimizer, range(1))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


def test_a_replaced_list_of_groups_and_a_replaced_state_are_noticed():
    """Wrappers assign ``optimizer.param_groups`` and ``optimizer.state`` anew."""
    params = parameters()
    optimizer = AdamW(params, compile="eager")
    grads = list(gradients(3))
    run(optimizer, params, grads[:1])
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    before = values(params)
    run(optimizer, params, grads[1:2])
    assert same(params, before)
    optimizer.state = collections.defaultdict(dict)
    run(optimizer, params, grads[2:])
    assert [int(optimizer.state[p]["step"]) for p in params] == [1] * len(params)


def test_a_parameter_taken_out_of_its_group_is_no_longer_stepped():
    params = parameters()
    optimizer = AdamW(params, compile="eager")
    grads = list(gradients(2))
    run(optimizer, params, grads[:1])
    optimizer.param_groups[0]["params"] = params[:2]
    before = values(params)
    run(optimizer, params, grads[1:])
    assert same(params[2:], before[2:])
    assert not torch.equal(params[0], before[0])


# --- hooks and closures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW, SGD, Own, Preset])
def test_every_hook_runs_exactly_once(cls):
    AdamW(parameters())  # a base class that was built before must not make its subclasses' hooks run twice
    model = mlp()
    optimizer = cls(model.parameters())
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("step pre"))
    optimizer.register_step_post_hook(lambda *a: calls.append("step post"))
    optimizer.register_state_dict_pre_hook(lambda *a: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda *a: calls.append("save post"))
    optimizer.register_load_state_dict_pre_hook(lambda *a: calls.append("load pre"))
    optimizer.register_load_state_dict_post_hook(lambda *a: calls.append("load post"))
    train(model, optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


def test_a_load_hook_may_replace_the_state_dict():
    model = mlp()
    optimizer = AdamW(model.parameters())
    saved = copy.deepcopy(optimizer.state_dict())

    def halve(optimizer, state_dict):
        groups = [{**g, "lr": g["lr"] / 2} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == saved["param_groups"][0]["lr"] / 2


def test_a_closure_is_called_once_with_gradients_enabled_and_its_loss_returned():
    model, plain = mlp(), mlp()
    optimizer = AdamW(model.parameters())
    losses = []

    def closure():
        assert torch.is_grad_enabled()
        losses.append(backward(model, 0))
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    train(plain, AdamW(plain.parameters()), range(1))
    assert same(model.parameters(), plain.parameters())
    assert optimizer.step() is None


# --- gradients --------------------------------------------------------------------------------------------------------


def test_grad_scaler_skips_a_step_with_an_infinite_gradient():
    model, plain = mlp(), mlp()
    optimizer, plain_optimizer = AdamW(model.parameters()), AdamW(plain.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = values(model.parameters())
    for step in range(3):
        scaler.scale(loss_of(model, step) * (float("inf") if step == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 0:
            assert same(model.parameters(), before)
            assert not optimizer.state
    train(plain, plain_optimizer, range(1, 3))
    assert distance(model.parameters(), plain.parameters()) < 1e-6
    assert {int(s["step"]) for s in optimizer.state.values()} == {2}


@pytest.mark.parametrize("consume", [True, False])
def test_step_clears_gradients_only_if_asked_to(consume):
    params = parameters()
    optimizer = AdamW(params, consume_grad=consume)
    [grads] = gradients(1)
    run(optimizer, params, [grads])
    if consume:
        assert [p.grad for p in params] == [None] * len(params)
    else:
        assert same([p.grad for p in params], grads)


def test_used_gradients_are_not_kept_alive():
    [p] = parameters([(50, 50)])
    optimizer = AdamW([p])
    for _ in range(2):
        p.grad = torch.ones(50, 50)
        storage = weakref.ref(p.grad.untyped_storage())
        watched = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert watched() is None
        assert storage() is None


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    params = parameters()
    optimizer = AdamW(params, consume_grad=False)
    run(optimizer, params, gradients(1))
    optimizer.zero_grad(set_to_none=to_none)
    assert all(p.grad is None if to_none else not p.grad.any() for p in params)


def test_a_parameter_without_a_gradient_is_not_touched():
    params = parameters()
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = AdamW([*params, frozen], weight_decay=0.5)
    before = values([*params, frozen])
    for grads in gradients(3):
        params[0].grad = grads[0]
        optimizer.step()
    assert same([*params[1:], frozen], before[1:])
    assert not torch.equal(params[0], before[0])
    assert set(optimizer.state) == {params[0]}


@pytest.mark.parametrize("options", [{}, {"caution": True}], ids=["plain", "caution"])
def test_gradients_may_come_and_go(options):
    """Each parameter advances by its own count, as if it were trained alone."""
    params, alone = parameters(), parameters()
    optimizer = AdamW(params, weight_decay=0.1, warmup_steps=3, compile="eager", **options)
    singles = [AdamW([p], weight_decay=0.1, warmup_steps=3, compile="eager", **options) for p in alone]
    for step, grads in enumerate(gradients(12)):
        for i, (p, q, g) in enumerate(zip(params, alone, grads, strict=True)):
            if step % (i + 1) == 0:
                p.grad, q.grad = g.clone(), g.clone()
                singles[i].step()
        optimizer.step()
    assert distance(params, alone) < drift(torch.float32, 12)
    assert [int(optimizer.state[p]["step"]) for p in params] == [12, 6, 4, 3, 3]


def test_a_step_that_fails_leaves_everything_as_it_was():
    params = parameters()
    optimizer = AdamW(params, compile="eager")
    run(optimizer, params, gradients(1))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[0]["lr"] = "high"
    with pytest.raises((TypeError, ValueError)):
        run(optimizer, params, gradients(1))
    after = optimizer.state_dict()["state"]
    for i, entry in before.items():
        assert same(entry.values(), after[i].values())


# --- shapes, dtypes and memory orders ---------------------------------------------------------------------------------


def order(tensor, how):
    """``tensor``'s values in another memory order."""
    if how == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if how == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "strided":
        return torch.stack([tensor, tensor], -1).reshape(*tensor.shape[:-1], -1)[..., ::2]
    if how == "offset":
        return torch.cat([torch.zeros(3), tensor.flatten()])[3:].view(tensor.shape)
    return tensor.clone()


ORDERS = ["contiguous", "channels_last", "transposed", "strided", "offset"]


@pytest.mark.parametrize(
    ("grad_order", "backend"),
    combined(["contiguous", "channels_last"], ["eager", "inductor"], compiled=[("channels_last", "inductor")]),
)
def test_memory_orders_do_not_matter(grad_order, backend):
    shape = (4, 3, 2, 2)
    [start] = parameters([shape])
    params = [nn.Parameter(order(start.detach(), how)) for how in ORDERS]
    optimizer = AdamW(params, weight_decay=0.1, caution=True, compile=backend)
    for [g] in gradients(5, [shape]):
        for p in params:
            p.grad = order(g, grad_order)
        optimizer.step()
    assert distance(params[1:], [params[0]] * (len(params) - 1)) < 1e-6
    assert distance([params[0]], [start]) > 1e-3
    assert params[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["eager", "cpp", "inductor"])
def test_a_model_may_change_its_memory_order_between_steps(backend):
    shape = (4, 3, 2, 2)
    [p], [q] = parameters([shape]), parameters([shape])
    ours, plain = AdamW([p], compile=backend), AdamW([q], compile="eager")
    for step, [g] in enumerate(gradients(4, [shape])):
        if step == 2:
            p.data = order(p.data, "channels_last")
        p.grad, q.grad = order(g, "channels_last" if step >= 2 else ""), g.clone()
        ours.step()
        plain.step()
    assert distance([p], [q]) < 1e-6


def test_a_state_tensor_of_another_memory_order_is_read_right():
    shape = (4, 3, 2, 2)
    [p], [q] = parameters([shape]), parameters([shape])
    p.data = order(p.data, "channels_last")
    optimizers = AdamW([p], compile="inductor"), AdamW([q], compile="eager")
    for step, [g] in enumerate(gradients(4, [shape])):
        if step == 2:
            state = optimizers[0].state[p]
            state["exp_avg"] = state["exp_avg"].contiguous()
        for param, optimizer in zip((p, q), optimizers, strict=True):
            param.grad = g.clone()
            optimizer.step()
    assert distance([p], [q]) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "cpp", "inductor"])
def test_empty_zero_dimensional_and_single_element_parameters(backend):
    shapes = [(), (1,), (1, 1), (0,), (3, 0)]
    params, whole = parameters(shapes), parameters([(1,)])
    with torch.no_grad():
        for p in params:
            p.fill_(float(whole[0]))
    optimizer = AdamW(params, caution=True, weight_decay=0.1, compile=backend)
    plain = AdamW(whole, caution=True, weight_decay=0.1, compile="eager")
    for step in range(4):
        run(optimizer, params, [[torch.full_like(p, step - 1.0) for p in params]])
        run(plain, whole, [[torch.full((1,), step - 1.0)]])
    assert all(abs(float(p) - float(whole[0])) < 1e-7 for p in params[:3])
    assert set(optimizer.state) == set(params[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_mixed_model_steps_each_dtype_by_itself(dtype):
    mixed = [*parameters(), *parameters(dtype=dtype)]
    single, other = parameters(), parameters(dtype=dtype)
    optimizer = AdamW(mixed, compile="eager")
    grads = list(gradients(4))
    run(optimizer, mixed, [[*g, *(x.to(dtype) for x in g)] for g in grads])
    run(AdamW(single, compile="eager"), single, grads)
    run(AdamW(other, compile="eager"), other, [[x.to(dtype) for x in g] for g in grads])
    assert same(mixed, [*single, *other])


def test_a_default_device_does_not_reach_into_the_step():
    params, plain = parameters(), parameters()
    with torch.device("meta"):
        run(AdamW(params, caution=True, compile="eager"), params, gradients_on_cpu(3))
    run(AdamW(plain, caution=True, compile="eager"), plain, gradients_on_cpu(3))
    assert same(params, plain)


def gradients_on_cpu(steps):
    return [[torch.full_like(p, s + 1.0, device="cpu") for p in CPU] for s in range(steps)]


CPU = parameters()


# --- copies and lifetimes ---------------------------------------------------------------------------------------------


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def through_torch_save(pair):
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("cls", [AdamW, SGD, Own, Preset])
def test_a_copy_steps_on_as_if_uninterrupted(cls, copied):
    model = mlp()
    optimizer = cls(model.parameters(), weight_decay=0.1, division_backend="atan2")
    train(model, optimizer, range(3))
    twin, twin_optimizer = copied((model, optimizer))
    assert type(twin_optimizer) is cls
    for group in twin_optimizer.param_groups:
        assert {id(p) for p in group["params"]} == {id(p) for p in twin.parameters()}
    train(twin, twin_optimizer, range(3, 6))
    frozen = values(model.parameters())
    train(model, optimizer, range(3, 6))
    assert not same(model.parameters(), frozen)
    assert same(model.parameters(), twin.parameters())
    assert {int(s["step"]) for s in twin_optimizer.state.values()} == {6}


def test_a_copied_counter_does_not_bring_the_others_along():
    params = parameters()
    optimizer = AdamW(params)
    run(optimizer, params, gradients(1))
    twin = through_pickle(optimizer)
    assert {s["step"].untyped_storage().nbytes() for s in twin.state.values()} == {4}


def test_a_copy_may_be_made_before_the_first_step():
    model = mlp()
    twin, twin_optimizer = copy.deepcopy((model, AdamW(model.parameters())))
    train(twin, twin_optimizer, range(1))
    assert not same(model.parameters(), twin.parameters())


@pytest.mark.parametrize("backend", ["eager", "cpp", "inductor"])
def test_parameters_and_state_are_freed_with_the_optimizer(backend):
    model = mlp()
    optimizer = AdamW(model.parameters(), compile=backend)
    train(model, optimizer, range(2))
    watched = [weakref.ref(p) for p in model.parameters()]
    watched += [weakref.ref(s["exp_avg"]) for s in optimizer.state.values()]
    del model, optimizer
    gc.collect()
    assert [w() for w in watched] == [None] * len(watched)


def test_two_optimizers_do_not_meddle_with_each_other():
    first, second, alone = mlp(), mlp(), mlp()
    a, b, c = AdamW(first.parameters(), lr=0.1), AdamW(second.parameters()), AdamW(alone.parameters())
    for step in range(5):
        backward(alone, step)
        copy_gradients(alone.parameters(), first.parameters())
        copy_gradients(alone.parameters(), second.parameters())
        for optimizer in (a, b, c):
            optimizer.step()
    assert same(second.parameters(), alone.parameters())
    assert not same(first.parameters(), alone.parameters())
