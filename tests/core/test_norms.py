"""``report_norms=True``: what ``optimizer.norms()`` says of a step is what became of copies of the weights; no bit changes."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from core.kit import gradients, mlp, one_of_each, optimizer_of, parameters, run, split, train
from torch import nn

import hbcore
from hb_adam import AdamW, SparseAdam
from hbcore.api import Transform
from hbcore.engine import offload
from hbcore.engine.param_codec import full_of
from hbcore.errors import OptionError, RuleError
from hbcore.testing import Subject

EVERY = sorted({*hbcore.list_optimizers()} - {"SparseAdam"})
MARKED = {p.values[0]: p.marks for p in one_of_each(EVERY)}
BACKENDS = [*(("eager", name) for name in EVERY), *((b, n) for b in ("triton", "cpp") for n in ("AdamW", "SFAdamW", "Muon"))]
BACKENDS += [("inductor", "AdamW")]


def rms(t):
    return float(t.double().square().mean().sqrt())


def weights(optimizer):
    """The weights that steps compute with, by name or place."""
    cores = [child.core for child in getattr(optimizer, "children", [optimizer])]
    owners = {p: core for core in cores for group in core.groups for p in group["params"]}
    found = {}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            full = full_of(owners[p], p)
            name = group["param_names"][i] if "param_names" in group else len(found)
            found[name] = (p.detach() if full is None else full).clone()
    return found


def agree(norms, before, after, eps=None, tolerance=1e-5):
    assert norms.keys() == after.keys()
    for name, (update, weight) in norms.items():
        # the weights are rounded, and their difference with them: by half a unit in the last place at most
        room = float(after[name].double().abs().max()) * (eps or torch.finfo(after[name].dtype).eps)
        assert math.isclose(weight, rms(after[name]), rel_tol=tolerance, abs_tol=room)
        assert math.isclose(update, rms(after[name].double() - before[name].double()), rel_tol=tolerance, abs_tol=room)


def alike(ours, theirs, backend):
    """Whether two tensors are the same bit for bit; on the eager backend, within a rounding error of the largest element.

    It packs small tensors where a pass does not reduce, and a vector's last elements may be rounded otherwise: with AVX-512,
    atan2 of 16 numbers alone differs from that of the same among others.
    """
    if torch.equal(ours, theirs) or backend != "eager" or not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    return float((ours - theirs).abs().max()) <= torch.finfo(theirs.dtype).eps * float(theirs.abs().max())


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:.*max_lr")
@pytest.mark.parametrize(
    ("backend", "name"), [pytest.param(b, n, marks=MARKED[n] if b == "eager" else ()) for b, n in BACKENDS]
)
def test_they_are_true_and_change_no_weight(name, backend):
    if backend == "triton" and not pytest.importorskip("hbcore.engine.backends.triton.device_lib").INTERPRETED:
        pytest.skip("runs under Triton's interpreter")
    subject = Subject(hbcore.get(name), hbcore.info(name).spec.capabilities, {"compile": backend})
    plain, trial = subject.mlp(), subject.mlp(report_norms=True)
    assert trial.optimizer.norms() == {}
    for _ in range(6):
        before = weights(trial.optimizer)
        plain.step()
        trial.step()
        assert all(alike(a, b, backend) for a, b in zip(trial.values().values(), plain.values().values(), strict=True))
        norms, after = trial.optimizer.norms(), weights(trial.optimizer)
        assert all(torch.equal(before[name], after[name]) for name in after.keys() - norms.keys()), (
            "a first step may only prime"
        )
        agree(norms, before, {name: after[name] for name in norms})
    assert norms.keys() == trial.params.keys()
    ours, theirs = trial.state(), plain.state()
    assert ours.keys() == theirs.keys(), "nothing is kept"
    assert all(alike(t, theirs[key], backend) for key, t in ours.items() if isinstance(t, torch.Tensor))


@pytest.mark.filterwarnings("ignore:.*param_ecc")
@pytest.mark.parametrize(
    "options",
    [
        {"ecc": "int8"}, {"ecc": "bf16+8", "param_ecc": "bf16+8"}, {"param_ecc": "bf16+8", "stochastic_rounding": True},
        {"gradient_clipping": ("global_l2norm_clip", 0.1)}, {"caution": True}, {"use_ema": True}, {"multi_tensor": False},
        {"weight_decay": 0.5}, {"skip_nonfinite": True}, {"capturable": True}, {"dtype": torch.float64},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", ["eager", "triton", "cpp"])
def test_with_other_options(backend, options):
    options = dict(options)
    shapes = ((10, 32), (64,), (), (3, 4, 5))
    dtype = options.pop("dtype", torch.float32)
    params = parameters(shapes, dtype)
    optimizer = AdamW(params, lr=0.01, compile=backend, report_norms=True, **options)
    for grads in gradients(3, shapes, params[0].dtype):
        before = weights(optimizer)
        run(optimizer, params, [grads])
        agree(optimizer.norms(), before, weights(optimizer), 2**-15 if "param_ecc" in options else None)


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_in_bfloat16_they_are_of_the_step_before_it_is_rounded(name):
    shapes = ((10, 32), (64,))
    norms = []
    for dtype in (torch.bfloat16, torch.float32):
        params = [nn.Parameter(p.detach().bfloat16().to(dtype)) for p in parameters(shapes)]
        optimizer = hbcore.get(name)(params, lr=1e-5, compile="eager", report_norms=True, promote=True)
        run(optimizer, params, [[g.bfloat16().to(dtype) for g in grads] for grads in gradients(1, shapes)])
        norms.append(optimizer.norms())
    for i in range(2):
        assert norms[0][i].update == pytest.approx(norms[1][i].update, rel=1e-2) and norms[0][i].update > 1e-6


def test_parameters_have_their_names_or_places_and_only_those_that_stepped():
    params = parameters()
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], compile="eager", report_norms=True)
    run(optimizer, params, [[g if i % 2 else None for i, g in enumerate(grads)] for grads in gradients(2)])
    assert list(optimizer.norms()) == [1, 3]
    model = mlp()
    optimizer = AdamW(model.named_parameters(), compile="eager", report_norms=True)
    train(model, optimizer, range(2))
    assert list(optimizer.norms()) == [name for name, _ in model.named_parameters()]


def test_optimizers_made_of_optimizers_report_together():
    model = mlp()
    specs = [{"optimizer": "Muon", "when": lambda p: p.ndim > 1}, {"optimizer": "SFAdamW"}]
    optimizer = hbcore.SplitOpt(model.named_parameters(), specs, lr=0.01, report_norms=True)
    for t in range(3):
        before = weights(optimizer)
        train(model, optimizer, [t])
        agree(optimizer.norms(), before, weights(optimizer))
    assert optimizer.norms().keys() == {name for name, _ in model.named_parameters()}
    with pytest.raises(OptionError, match="reports no norms; pass report_norms=True"):
        split(mlp()).norms()


def test_a_step_that_is_skipped_moved_nothing():
    params = parameters()
    optimizer = AdamW(params, compile="eager", report_norms=True, skip_nonfinite=True)
    run(optimizer, params, gradients(2))
    before = weights(optimizer)
    run(optimizer, params, [[g * math.nan for g in grads] for grads in gradients(1)])
    assert all(update == 0 for update, _ in optimizer.norms().values())
    agree(optimizer.norms(), before, before)


def test_offloaded_state_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(offload, "APPLIES", ("cuda", "cpu"))
    monkeypatch.setattr(offload, "SHARE", 128)
    params = parameters()
    optimizer = AdamW(params, compile="eager", report_norms=True, offload="cpu")
    for grads in gradients(3):
        before = weights(optimizer)
        run(optimizer, params, [grads])
        agree(optimizer.norms(), before, weights(optimizer))


def test_all_numbers_come_in_one_copy_and_no_step_waits_for_them(monkeypatch):
    copies = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: (copies.append(t.shape), cpu(t))[1])
    params = [*parameters(), *parameters(dtype=torch.float64)]
    optimizer = AdamW(params, compile="eager", report_norms=True)
    run(optimizer, params, [[*a, *b] for a, b in zip(gradients(2), gradients(2, dtype=torch.float64), strict=True)])
    assert not copies
    optimizer.norms()
    assert copies == [(len(params), 2)]


def test_copies_of_an_optimizer_report_too():
    model = mlp()
    optimizer = AdamW(model.parameters(), report_norms=True)
    train(model, optimizer, range(2))
    model, optimizer = copy.deepcopy((model, optimizer))
    assert optimizer.norms() == {}
    train(model, optimizer, range(2))
    assert len(optimizer.norms()) == 6


def test_what_is_refused_says_so():
    with pytest.raises(OptionError, match="AdamW reports no norms; pass report_norms=True"):
        AdamW(parameters()).norms()
    with pytest.raises(OptionError, match="a step takes single rows"):
        SparseAdam(parameters(), report_norms=True)
    model = mlp()
    with pytest.raises(OptionError, match="speaks of one step of all parameters"):
        hbcore.hook_into_backward(model, AdamW(model.parameters(), report_norms=True))


def test_rules_that_cannot_be_fused_are_refused():
    @dataclass(frozen=True)
    class Sorted(Transform):
        name = "sorted"

        def update(self, u, s, c):
            return u.flatten().sort().values.view_as(u), {}

    params = parameters()
    with pytest.raises(RuleError, match="report_norms=True needs rules that can be fused"):
        run(optimizer_of(Sorted)(params, report_norms=True), params, gradients(1))
