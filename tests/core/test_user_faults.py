"""What users do to an optimizer object, one test for each kind of report: the right values, whatever optimizer it is."""

from __future__ import annotations

import gc
import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from core.kit import gradients, optimizer_of, parameters, run

import hbcore
from hb_adam import AdamW
from hbcore.api import Domain, Transform
from hbcore.errors import HyperparameterError, OptionError

FAMILIES = ["AdamW", "SGD", "SFAdamW", "Muon", "SOAP", "PSGDKron", "Scion", "Adafactor"]
SHAPES = ((6, 4), (5,), (3, 2, 2))


def trained(name, steps=4, before=None, **options):
    """A trained optimizer and its parameters; ``before`` is called with the optimizer and the step ahead of each."""
    params = parameters(SHAPES)
    optimizer = hbcore.get(name)(params, lr=0.01, **options)
    for t, grads in enumerate(gradients(steps, SHAPES)):
        if before is not None:
            before(optimizer, t)
        run(optimizer, params, [grads])
    return optimizer, [p.detach() for p in params]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_within_autocast_is_the_same(name, dtype):
    _, outside = trained(name)
    with torch.autocast("cpu", dtype):
        _, inside = trained(name)
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
@pytest.mark.parametrize("name", FAMILIES)
def test_numpys_numbers_in_a_group_are_saved_as_plain_ones(name, kind):
    def schedule(optimizer, t):
        for group in optimizer.param_groups:
            group["weight_decay"] = kind(t)

    optimizer, _ = trained(name, before=schedule)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    [group] = torch.load(file, weights_only=True)["param_groups"]
    assert type(group["weight_decay"]) in (int, float) and group["weight_decay"] == 3


def test_numpys_numbers_in_a_tuple_are_saved():
    optimizer, _ = trained("AdamW", betas=(np.float32(0.5), np.float64(0.75)))
    [group] = optimizer.state_dict()["param_groups"]
    assert group["betas"] == (0.5, 0.75) and all(type(b) is float for b in group["betas"])


@pytest.mark.parametrize("scale", [0, 0.0, -1.0, float("nan")])
def test_a_scale_at_which_nothing_moves_is_refused(scale):
    with pytest.raises(HyperparameterError, match=r"atan2_scale=.*\(0, inf\)"):
        AdamW(parameters(SHAPES), division_backend="atan2", atan2_scale=scale)


INFINITE = {
    "a constant for elements": lambda u, c: torch.where(u > 1e9, torch.inf, u),
    "not a number": lambda u, c: torch.where(u > 1e9, torch.nan, torch.where(u < -1e9, -torch.inf, u)),
    "a constant for a host number": lambda u, c: u * torch.where(c.step > 5, torch.inf, c.step).clamp(max=1.0),
    "a bound of a host number": lambda u, c: u * c.step.clamp(min=1.0, max=torch.inf),
    "a constant for a reduction": lambda u, c: u * torch.where(c.norm(u) > 1e9, torch.inf, 1.0),
}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", INFINITE)
def test_infinite_constants_in_a_rule(case, backend):
    if backend == "triton":
        helpers = pytest.importorskip("hbcore.engine.backends.triton.device_lib")
        if not helpers.INTERPRETED:
            pytest.skip("runs under Triton's interpreter")

    @dataclass(frozen=True)
    class Rule(Transform):
        name = "rule"
        domain = Domain.TENSOR

        def update(self, u, s, c):
            return INFINITE[case](u, c), {}

    params = parameters(((4, 3),))
    start, [grad] = params[0].detach().clone(), next(iter(gradients(1, ((4, 3),))))
    optimizer = optimizer_of(Rule)(params, lr=0.5, compile=backend)
    run(optimizer, params, [[grad]])
    assert optimizer.report.backend == backend
    torch.testing.assert_close(params[0].detach(), start - 0.5 * grad)


def swap_memory(optimizer, t, factor=1.0):
    """The usual way to move state to another device and back: every tensor keeps its identity and gets other memory."""
    if t == 2:
        for slots in optimizer.state.values():
            for key, value in slots.items():
                value.data = value.data.clone() if key == "step" else value.data * factor


def saved(optimizer):
    return [v.clone() for slots in optimizer.state_dict()["state"].values() for v in slots.values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_swapped_under_state_changes_nothing_and_stays_live(name):
    plain, moved = trained(name, steps=6), trained(name, steps=6, before=swap_memory)
    assert all(map(torch.equal, plain[1], moved[1]))
    assert all(map(torch.equal, saved(plain[0]), saved(moved[0])))


@pytest.mark.parametrize("name", FAMILIES)
def test_other_values_in_swapped_memory_are_obeyed(name):
    """As if they had been written in place."""

    def halve(optimizer, t):
        if t == 2:
            for slots in optimizer.state.values():
                for key, value in slots.items():
                    if key != "step":
                        value.mul_(0.5)

    in_place = trained(name, steps=6, before=halve)
    swapped = trained(name, steps=6, before=lambda optimizer, t: swap_memory(optimizer, t, 0.5))
    assert all(map(torch.equal, in_place[1], swapped[1]))
    assert all(map(torch.equal, saved(in_place[0]), saved(swapped[0])))


def live_bytes():
    gc.collect()
    storages = (t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_grows_when_state_is_replaced_around_each_step(name):
    params = parameters(SHAPES)
    optimizer, sizes = hbcore.get(name)(params), []
    for t, grads in enumerate(gradients(30, SHAPES)):
        for slots in optimizer.state.values():
            slots.update({k: v.clone() for k, v in slots.items() if v.ndim})
        run(optimizer, params, [grads])
        if t in (9, 29):
            sizes.append(live_bytes())
    assert sizes[1] <= sizes[0]


def test_a_group_may_repeat_what_holds_for_the_optimizer():
    """torch's own groups have ``foreach=None``; ZeroRedundancyOptimizer puts every option into each group."""
    harmless = {"foreach": None, "fused": None, "capturable": False, "caution": True, "multi_tensor": True, "ecc": "bf16+8"}
    optimizer = AdamW([{"params": parameters(SHAPES), **harmless}], caution=True, ecc="bf16+8")
    assert not harmless.keys() & optimizer.param_groups[0].keys()


@pytest.mark.parametrize("option", [{"caution": False}, {"foreach": False}, {"capturable": True}, {"caution": 1}], ids=str)
def test_a_group_may_not_have_another_option_than_the_optimizer(option):
    with pytest.raises(OptionError, match=f"parameter group 0: {next(iter(option))}=.*whole optimizer"):
        AdamW([{"params": parameters(SHAPES), **option}], caution=True)


@pytest.mark.parametrize("device", ["meta", "cpu"])  # "cpu", once set, is passed to every function that makes a tensor
@pytest.mark.parametrize("name", [*FAMILIES, "AdEMAMix", "NAdam"])
def test_another_default_device_changes_nothing(name, device):
    _, usual = trained(name)
    params, steps = parameters(SHAPES), list(gradients(4, SHAPES))
    try:
        torch.set_default_device(device)
        optimizer = hbcore.get(name)(params, lr=0.01)
        for grads in steps[:2]:
            run(optimizer, params, [grads])
        resumed = hbcore.get(name)(params, lr=0.01)
        resumed.load_state_dict(optimizer.state_dict())
        for grads in steps[2:]:
            run(resumed, params, [grads])
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, usual, params))


@pytest.mark.parametrize("hand_out", [lambda o: o.state, lambda o: o.state_dict()], ids=["state", "state_dict"])
def test_tensors_handed_out_once_may_be_moved_at_any_later_time(hand_out):
    """The addresses of state are looked at from then on, and not before: whoever moves memory was handed the tensors."""
    params = parameters(SHAPES)
    optimizer, kept = AdamW(params, lr=0.01), None
    for t, grads in enumerate(gradients(6, SHAPES)):
        if t == 2:
            handed = hand_out(optimizer)
            kept = list(handed.get("state", handed).values())
        if t == 4:
            for slots in kept:
                for value in slots.values():
                    value.data = value.data.clone()
        run(optimizer, params, [grads])
    _, plain = trained("AdamW", steps=6)
    assert all(map(torch.equal, plain, params))
    assert all(torch.equal(a, b) for a, b in zip(saved(optimizer), saved(trained("AdamW", steps=6)[0]), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "SFAdamW", "Muon", "PSGDKron"])
def test_under_torch_compile_a_step_breaks_the_graph_once(name):
    from torch._dynamo.utils import counters

    ours, others = parameters(SHAPES), parameters(SHAPES)
    optimizer, plain = (hbcore.get(name)(params, lr=0.01) for params in (ours, others))
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for grads in gradients(3, SHAPES):
        for p, q, g in zip(ours, others, grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        step()
        plain.step()
    assert all(map(torch.equal, ours, others))
    assert counters["graph_break"].total() <= 2  # once in the caller's frame, once in step's; and nothing was traced within
    assert not counters["stats"].get("unique_graphs")
