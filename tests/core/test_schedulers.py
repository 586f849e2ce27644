"""Every scheduler of torch drives our optimizers as it drives torch's, and none of them compiles anything."""

from __future__ import annotations

import pytest
import torch
from core.kit import backward, copy_gradients, distance, mlp, parameters
from rounding import drift
from torch.optim import lr_scheduler

from hb_adam import SGD, AdamW

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def test_no_scheduler_of_torch_is_missing():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


def optimizers(cls, their_model, our_model, tensor_lr):
    def groups(model):
        first, second = [list(model[0].parameters()), list(model[3].parameters())]
        lrs = [torch.tensor(1e-3), torch.tensor(3e-3)] if tensor_lr else [1e-3, 3e-3]
        return [{"params": first, "lr": lrs[0]}, {"params": second, "lr": lrs[1]}]

    if cls is AdamW:
        return torch.optim.AdamW(groups(their_model), betas=(0.9, 0.99), weight_decay=0.1), AdamW(
            groups(our_model), weight_decay=0.1, division_backend="eps_add", compile="eager"
        )
    return torch.optim.SGD(groups(their_model), momentum=0.9), SGD(groups(our_model), momentum=0.9, compile="eager")


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("cls", [AdamW, SGD])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_moves_ours_as_it_moves_torchs(scheduler, cls, tensor_lr):
    their_model, our_model = mlp(), mlp()
    both = optimizers(cls, their_model, our_model, tensor_lr)
    schedules = [SCHEDULERS[scheduler](o) for o in both]
    for step in range(15):
        backward(their_model, step)
        copy_gradients(their_model.parameters(), our_model.parameters())
        for optimizer in both:
            optimizer.step()
        for schedule in schedules:
            if scheduler == "ReduceLROnPlateau":
                schedule.step(1.0)
            else:
                schedule.step()
        for theirs, ours in zip(*(o.param_groups for o in both), strict=True):
            for key in ("lr", "betas", "momentum"):
                assert ours.get(key) == theirs.get(key)
                assert isinstance(ours.get(key), type(theirs.get(key)))
    assert distance(our_model.parameters(), their_model.parameters()) < drift(torch.float32, 15)
    assert both[1].report.programs == 1


def scheduled_steps(optimizer, params, count, start=0):
    """Change every number of every group before every step."""
    for step in range(start, start + count):
        for g, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-3 * (1 + step + g)
            group["betas"] = (0.5 + 0.4 / (1 + step), 0.99 - 1e-4 * step)
            group["eps"] = 1e-8 * (1 + step)
            group["weight_decay"] = 0.1 / (1 + step)
            group["warmup_steps"] = step % 7
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()


def test_scheduling_every_number_for_50_steps_compiles_nothing():
    params = parameters([(300, 200), (40, 40, 5, 5), (50_000,), (30, 20), (7,), (2, 3, 4), (4, 3, 2, 2), (1,), ()])
    optimizer = AdamW([{"params": params[::2]}, {"params": params[1::2]}], compile="inductor")
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    scheduled_steps(optimizer, params, 2)
    before = optimizer.report.compiles, optimizer.report.programs
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before == (2, 1)
    assert graphs - compiled == 2  # one for large tensors and one for small ones, whatever their shapes
    scheduled_steps(optimizer, params, 50, start=2)
    assert (optimizer.report.compiles, optimizer.report.programs) == before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert optimizer.report.backend == "inductor"


def test_a_scheduled_list_is_as_good_as_a_tuple():
    [p] = parameters([(3,)])
    optimizer = AdamW([p])
    optimizer.param_groups[0]["betas"] = [0.8, 0.9]
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.isfinite(p).all()
