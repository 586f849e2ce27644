"""``offload="cpu"`` on a GPU: the same bits, pinned homes, and memory for a few shares only, whoever else uses the device."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from core.kit import parameters
from torch import nn

import hbcore
from hbcore.engine import offload
from hbcore.errors import OptionError

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = ((512, 384), (384,), (384, 512), (256, 256), (256, 256), (1000,), (3, 5, 7), (), (2048, 512))
EVERY = sorted({*hbcore.list_optimizers()} - {"SparseAdam", "PSGDLRA", "SAMWrapper", "MSAMLaProp"})


def built(name, shapes=SHAPES, dtype=torch.float32, **options):
    params = [nn.Parameter(p.detach().to(DEVICE)) for p in parameters(shapes, dtype)]
    return params, hbcore.get(name)(list(zip(map(str, range(len(params))), params, strict=True)), lr=0.01, **options)


def step(params, optimizer, t):
    generator = torch.Generator(DEVICE).manual_seed(t)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=DEVICE).to(p.dtype)
    optimizer.step()


def run(params, optimizer, steps):
    for t in steps:
        step(params, optimizer, t)


def state(optimizer):
    return [t for slots in optimizer.state.values() for t in slots.values()]


def same(ours, theirs):
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(params=[32 << 20, 1 << 18])
def share(request, monkeypatch):
    monkeypatch.setattr(offload, "SHARE", request.param)
    monkeypatch.setattr(offload, "RESIDENT", 4 * request.param)
    return request.param


@pytest.mark.parametrize("options", [{}, {"ecc": "int8"}, {"ecc": "bf16+8", "stochastic_rounding": True}], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "Muon", "SOAP", "PSGDKron"])
def test_a_run_is_the_same_bit_for_bit(name, options, share):
    (expected, plain), (params, away) = built(name, **options), built(name, offload="cpu", **options)
    run(expected, plain, range(6))
    run(params, away, range(6))
    assert away.report.backend == plain.report.backend
    assert same(params, expected) and same(state(away), state(plain))


@pytest.mark.filterwarnings("ignore::hbcore.errors.StateWarning", "ignore:.*max_lr")
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_runs_the_same(name, monkeypatch):
    monkeypatch.setattr(offload, "SHARE", 1 << 18)
    (expected, plain), (params, away) = built(name, compile="eager"), built(name, offload="cpu", compile="eager")
    run(expected, plain, range(3))
    run(params, away, range(3))
    assert same(params, expected) and same(state(away), state(plain))


def test_a_device_that_is_busy_with_other_memory_changes_no_bit(monkeypatch):
    """Between steps and within backward passes, others take and fill the memory that state had."""
    monkeypatch.setattr(offload, "SHARE", 1 << 18)
    (expected, plain), (params, away) = built("AdamW"), built("AdamW", offload="cpu")
    run(expected, plain, range(20))
    for t in range(20):
        noise = [torch.full((1 << 18,), float("nan"), device=DEVICE) for _ in range(20)]
        noise = [x @ x for x in (n.view(512, 512) for n in noise)]
        del noise
        step(params, away, t)
        noise = [torch.full((1 << 18,), float("nan"), device=DEVICE) for _ in range(20)]
        del noise
    assert same(params, expected) and same(state(away), state(plain))


def test_another_stream_may_be_the_main_one():
    (expected, plain), (params, away) = built("AdamW"), built("AdamW", offload="cpu")
    run(expected, plain, range(5))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(params, away, range(5))
    torch.cuda.current_stream().wait_stream(stream)
    assert same(params, expected)


def test_state_is_pinned_and_true_as_soon_as_a_step_returns():
    params, optimizer = built("AdamW", offload="cpu")
    for t in range(3):
        step(params, optimizer, t)
        seen = [t.clone() for t in state(optimizer)]  # a host's read, which waits for nothing
        torch.cuda.synchronize()
        assert same(seen, state(optimizer))
    assert all(t.is_pinned() for slots in optimizer.state.values() for n, t in slots.items() if n != "step")


def test_memory_between_steps_is_nothing_and_within_them_a_few_shares(monkeypatch):
    monkeypatch.setattr(offload, "SHARE", 8 << 20)
    monkeypatch.setattr(offload, "RESIDENT", 32 << 20)
    params, optimizer = built("AdamW", shapes=((1024, 1024),) * 32)  # 256 MiB of state
    reference = torch.cuda.memory_allocated()
    del params, optimizer
    params, optimizer = built("AdamW", shapes=((1024, 1024),) * 32, offload="cpu", consume_grad=False)
    run(params, optimizer, range(2))
    gc.collect()
    before = torch.cuda.memory_allocated()
    assert before < reference + (128 << 20) + (8 << 20), "parameters and gradients, and small tables"
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before <= (32 << 20) + (4 << 20)
    assert torch.cuda.memory_allocated() == before


def test_a_resumed_copied_and_loaded_run_goes_on_the_same():
    params, optimizer = built("SOAP", offload="cpu")
    run(params, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    others, second = built("SOAP", offload="cpu")
    with torch.no_grad():
        torch._foreach_copy_(others, params)
    second.load_state_dict(saved)
    held = [t for slots in second.state.values() for n, t in slots.items() if n != "step" and t.ndim]
    assert all(t.device.type == "cpu" for t in held), "a load puts no state on the device"
    plain, third = built("SOAP")
    with torch.no_grad():
        torch._foreach_copy_(plain, params)
    third.load_state_dict(saved)
    for some, one in ((params, optimizer), (others, second), (plain, third)):
        run(some, one, range(3, 6))
    assert same(params, others) and same(params, plain)


def test_weights_to_evaluate_with_are_made_on_the_device():
    (expected, plain), (params, away) = built("SFAdamW", use_ema=True), built("SFAdamW", use_ema=True, offload="cpu")
    for some, one in ((expected, plain), (params, away)):
        run(some, one, range(3))
        one.eval()
    assert same(params, expected)
    for one in (plain, away):
        one.train()
    assert same(params, expected)
    with plain.ema_weights(), away.ema_weights():
        assert same(params, expected)


def test_a_captured_step_is_refused():
    with pytest.raises(OptionError, match="which a CUDA graph cannot do"):
        built("AdamW", offload="cpu", capturable=True)


def test_two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def result(**options):
        params = [nn.Parameter(p.detach().to(f"cuda:{i % 2}")) for i, p in enumerate(parameters(SHAPES))]
        optimizer = hbcore.get("SOAP")(params, lr=0.01, **options)
        for t in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator(p.device).manual_seed(t), device=p.device)
            optimizer.step()
        return [*params, *state(optimizer)]

    assert same(result(), result(offload="cpu"))
