"""State that is moved to another device gives its memory back at once, and trains on when it comes back."""

from __future__ import annotations

import gc

import pytest
import torch
from core.kit import gradients, parameters, run
from torch.multiprocessing.reductions import StorageWeakRef

import hbcore

FAMILIES = ["AdamW", "SGD", "SFAdamW", "Muon", "SOAP", "PSGDKron", "PSGDLRA", "Scion", "Adafactor"]
SHAPES = ((6, 4), (6, 4), (5,), (3, 2, 2))


def replace(slots, name, value):
    slots[name] = value


def swap(slots, name, value):
    slots[name].data = value


def state_of(optimizer):
    return [(slots, name) for slots in optimizer.state.values() for name in slots if name != "step"]


def trained(name, backend, between=None):
    params = parameters(SHAPES)
    optimizer = hbcore.get(name)(params, lr=0.01, compile=backend)
    for t, grads in enumerate(gradients(6, SHAPES)):
        run(optimizer, params, [grads])
        if between is not None and t in (2, 3):
            for p in params:
                p.grad = None
            between(optimizer)
    return optimizer, [p.detach() for p in params]


TRIALS = [*((name, "eager") for name in FAMILIES), ("AdamW", "triton"), ("SOAP", "triton")]


@pytest.mark.parametrize(("name", "backend"), TRIALS)
@pytest.mark.parametrize("put", [replace, swap])
def test_offloaded_state_frees_its_memory_at_once_and_comes_back(name, put, backend):
    if backend == "triton" and not pytest.importorskip("hbcore.engine.backends.triton.device_lib").INTERPRETED:
        pytest.skip("runs under Triton's interpreter")

    def offload_and_return(optimizer):
        held = [StorageWeakRef(slots[key].untyped_storage()) for slots, key in state_of(optimizer)]
        away = [slots[key].clone() for slots, key in state_of(optimizer)]  # another device's memory
        gc.disable()
        try:
            for slots, key in state_of(optimizer):
                put(slots, key, slots[key].new_empty(0))
            assert held and all(storage.expired() for storage in held)
        finally:
            gc.enable()
        for (slots, key), value in zip(state_of(optimizer), away, strict=True):
            put(slots, key, value)

    assert all(map(torch.equal, trained(name, backend)[1], trained(name, backend, offload_and_return)[1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_state_of_one_parameter_may_be_offloaded_alone(name):
    def only_the_first(optimizer):
        slots = next(iter(optimizer.state.values()))
        for key in [key for key in slots if key != "step"]:
            slots[key] = slots[key].clone()

    assert all(map(torch.equal, trained(name, "eager")[1], trained(name, "eager", only_the_first)[1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_looking_at_state_between_steps_changes_nothing(name):
    looked, plain = trained(name, "eager", lambda o: state_of(o)), trained(name, "eager")
    assert all(map(torch.equal, looked[1], plain[1]))
    assert looked[0].report.compiles == plain[0].report.compiles
