"""Accelerate: prepared optimizers, accumulation, clipping, saved states, skipped steps, two processes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from core.kit import distance, same
from distributed.ranks import on_ranks
from trainers import jobs
from trainers.tiny import OPTIMIZERS, differing, smoke, weights

import hbcore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def afresh():
    """Accelerate keeps its state in the process."""
    reset()
    yield
    reset()


def reset():
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(name, accumulate=1, precision="no"):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    model = jobs.net()
    optimizer = hbcore.create(name, model, **OPTIMIZERS[name])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    return accelerator, *accelerator.prepare(model, optimizer, schedule)


def train(accelerator, model, optimizer, schedule, data, clip=0.5):
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - y).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("variant", ["plain", *(pytest.param(v, marks=pytest.mark.full) for v in ("accumulated", "bf16"))])
@pytest.mark.parametrize("name", smoke("AdamW", "SFAdamW", "SOAP"))
def test_a_saved_state_is_restored_bit_for_bit(tmp_path, name, variant, mode):
    """Whichever of its two sets of weights a schedule-free optimizer has in the model when it is saved."""
    options = {"accumulate": 2 if variant == "accumulated" else 1, "precision": "bf16" if variant == "bf16" else "no"}
    data = list(jobs.batches(8))
    straight = prepared(name, **options)
    before = weights(straight[1])
    train(*straight, data[:4])
    getattr(straight[2], mode)()
    straight[0].save_state(tmp_path)
    straight[2].train()
    train(*straight, data[4:])
    assert len(differing(before, weights(straight[1]))) == len(before)
    reset()
    again = prepared(name, **options)
    again[0].load_state(tmp_path)
    again[2].train()
    train(*again, data[4:])
    assert not differing(weights(straight[1]), weights(again[1]))


def test_accumulated_gradients_make_one_step():
    """Four batches of two steps: the same as two batches of twice the rows."""
    halves = [(x[i::2], y[i::2]) for x, y in jobs.batches(2) for i in (0, 1)]
    whole = prepared("AdamW")
    train(*whole, jobs.batches(2), clip=1e9)
    parts = prepared("AdamW", accumulate=2)  # from here on the first one would accumulate too: they share what they know
    train(*parts, halves, clip=1e9)
    assert {float(s["step"]) for s in parts[2].state.values()} == {2.0}
    assert distance(weights(parts[1]).values(), weights(whole[1]).values()) < 1e-4


def test_clipping_reaches_the_optimizer():
    ends = []
    for clip in (1e9, 1e-9):
        run = prepared("PSGDKron")
        train(*run, jobs.batches(2), clip)
        ends.append(weights(run[1]))
    assert differing(*ends)


def test_the_modes_of_a_prepared_optimizer_are_those_of_ours():
    accelerator, model, optimizer, schedule = prepared("SFAdamW")
    train(accelerator, model, optimizer, schedule, jobs.batches(4))
    to_train = weights(model)
    optimizer.eval()
    assert differing(to_train, weights(model))
    optimizer.train()
    assert not differing(to_train, weights(model))


@pytest.mark.parametrize("name", smoke("AdamW", "SOAP"))
def test_parameters_replaced_by_shards_before_the_first_step_leave_no_state(name):
    """As under FSDP2, which Accelerate does not run on CPUs: the wrapped optimizer's groups get other parameters."""
    Accelerator(cpu=True)
    model, plain = jobs.net(), jobs.net()
    optimizer = AcceleratedOptimizer(hbcore.create(name, model, **OPTIMIZERS[name]))
    other = hbcore.create(name, plain, **OPTIMIZERS[name])
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1)
            group["params"][i].data_ptr = p.data_ptr()
    for part in model:
        for n, p in list(part.named_parameters(recurse=False)):
            setattr(part, n, torch.nn.Parameter(p.detach().clone()))
    fsdp2_switch_optimizer_parameters(optimizer, {address: model.get_parameter(n) for n, address in addresses.items()})
    for x, y in jobs.batches(3):
        for net, stepped in ((model, optimizer), (plain, other)):
            (net(x) - y).square().mean().backward()
            stepped.step()
    assert not differing(weights(model), weights(plain))
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_a_step_that_overflows_is_skipped_and_said_to_be(name):
    Accelerator(cpu=True)
    model, other = jobs.net(), jobs.net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer = AcceleratedOptimizer(hbcore.create(name, model, lr=0.01), scaler=scaler)
    plain = hbcore.create(name, other, lr=0.01)
    for i, (x, y) in enumerate(jobs.batches(4)):
        before = weights(model)
        scaler.scale((model(x) - y).square().mean()).backward()
        if i == 1:
            model[0].weight.grad[0, 0] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == (i == 1) == (not differing(before, weights(model)))
        if i != 1:
            (other(x) - y).square().mean().backward()
            plain.step()
    assert not differing(weights(model), weights(other)), "as if the step had not been: the scale is a power of two"


@pytest.mark.parametrize("name", ["AdamW", *(pytest.param(n, marks=pytest.mark.full) for n in ("SFAdamW", "MuonAdamW"))])
def test_two_processes_follow_one(name):
    alone = jobs.accelerated(0, 1, name, OPTIMIZERS[name])
    first, second = on_ranks(2, jobs.accelerated, 2, name, OPTIMIZERS[name])
    assert same(first, second)
    assert distance(first, alone) < 1e-4
