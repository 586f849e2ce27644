"""Checks of saving, loading and resuming."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from hbcore.errors import CheckpointError
from hbcore.testing import expect
from hbcore.testing.subject import Check, Subject, Trial, pull, through_file


def loading_keeps_every_dtype_and_value(subject: Subject) -> None:
    """If this fails, a resumed run continues with less precise state than before."""
    storages: tuple[dict[str, str], ...] = ({}, {"storage_dtype": "bfloat16"})
    for dtype in (torch.float32, torch.bfloat16):
        for storage in storages[:1] if "ecc" in subject.options else storages:
            trial, other = subject.mlp(dtype, **storage), subject.mlp(dtype, **storage)
            trial.train(3)
            what = f"a state dict of {dtype} parameters with {storage or 'plain state'}, saved and loaded"
            with expect.working(what):
                other.optimizer.load_state_dict(through_file(trial.optimizer.state_dict()))
            expect.same(other.state(), trial.state(), what)
            _expect_home(other, what)


def _expect_home(trial: Trial, what: str) -> None:
    """Expect every tensor on its parameter's device; counters may be on the host."""
    for name, p in trial.params.items():
        for slot, value in trial.optimizer.state[p].items():
            if isinstance(value, Tensor) and slot != "step":
                assert value.device == p.device, f"{what}: expected {slot} of {name} on {p.device}, found {value.device}"


def resuming_changes_no_bit(subject: Subject) -> None:
    """If this fails, an interrupted run gives a different result from an uninterrupted one."""
    _expect_exact_resume(subject.mlp, "float32 parameters", 10)
    _expect_exact_resume(lambda: subject.mlp(torch.bfloat16), "bfloat16 parameters", 4)
    _expect_exact_resume(subject.convnet, "a convolutional net", 3)


def resuming_compiled_changes_no_bit(subject: Subject) -> None:
    """If this fails, a run with compiled steps cannot be resumed exactly."""
    _expect_exact_resume(lambda: subject.loose((6, 4), (5,), compile="inductor"), "compiled steps", 3)


def _expect_exact_resume(build: Callable[[], Trial], what: str, half: int) -> None:
    """Expect a trial resumed from another's checkpoint to continue exactly like the other."""
    trial, resumed = build(), build()
    trial.train(half)
    model, optimizer = through_file(trial.model.state_dict()), through_file(trial.optimizer.state_dict())
    with expect.working(f"{what}, resumed"):
        resumed.model.load_state_dict(model)
        resumed.optimizer.load_state_dict(optimizer)
        resumed.taken = half
        resumed.train(half)
    trial.train(half)
    expect.same_trial(resumed, trial, f"{what}, {half} steps, a checkpoint and {half} more")


def saving_early_leaves_no_trace(subject: Subject) -> None:
    """If this fails, calling state_dict() before the first step changes the result."""
    trial, plain = subject.mlp(), subject.mlp()
    with expect.working("state_dict() of a fresh optimizer"):
        trial.optimizer.state_dict()
    found, wanted = len(trial.optimizer.state), len(plain.optimizer.state)
    assert found == wanted, f"expected state for {wanted} parameters after state_dict() of a fresh optimizer, found {found}"
    for t in (trial, plain):
        t.train(3)
    expect.same_trial(trial, plain, "three steps after state_dict() of a fresh optimizer")


def the_dry_step_of_distributed_checkpoints_leaves_no_trace(subject: Subject) -> None:
    """If this fails, torch.distributed.checkpoint changes the run that it saves, or saves nothing."""
    if not torch.distributed.is_available():
        raise SkipTest("torch was built without torch.distributed")
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    for begun in (False, True):
        trial, plain = subject.mlp(), subject.mlp()
        what = f"get_optimizer_state_dict() of a fresh optimizer, gradients {'set' if begun else 'None'}"
        if begun:
            trial.backward()
        before = trial.values()
        with expect.working(what):
            saved: dict[str, Any] = dict(get_optimizer_state_dict(trial.model, trial.optimizer))
        lacks = sorted(trial.params.keys() - saved["state"].keys())
        assert not lacks, f"{what}: expected state for every parameter, found none for {lacks}"
        expect.same(trial.values(), before, what)
        for t in (trial, plain):
            t.train(3)
        expect.same_trial(trial, plain, f"three steps after {what}")


def parameters_without_a_gradient_are_saved(subject: Subject) -> None:
    """If this fails, a rank without gradients saves other keys than the rest, and the checkpoint cannot be written."""
    trial, other, plain = (subject.loose((4, 3), (4, 3)) for _ in range(3))
    for t in (trial, plain):
        t.step(lambda t=t: pull({"p0": t.params["p0"]}, 0))  # type: ignore[misc]
        t.step(lambda t=t: pull({"p0": t.params["p0"]}, 1))  # type: ignore[misc]
    saved = trial.optimizer.state_dict()["state"]
    assert set(saved) >= {0, 1}, f"expected state for p0 and for p1, which never had a gradient; found entries {list(saved)}"
    lacks = sorted(saved[0].keys() - saved[1].keys())
    assert not lacks, f"expected p1, which never had a gradient, to be saved with the slots of p0; it lacks {lacks}"
    assert float(saved[1].get("step", 0)) == 0, f"expected p1 to be saved at step 0, found {saved[1]['step']}"
    with expect.working("loading a state dict with a parameter that never had a gradient"):
        other.model.load_state_dict(trial.model.state_dict())
        other.optimizer.load_state_dict(through_file(trial.optimizer.state_dict()))
    other.taken = plain.taken
    for t in (other, plain):
        t.train(3)
    expect.same_trial(other, plain, "the first gradients of p1, after resuming")


def state_is_matched_by_name(subject: Subject) -> None:
    """If this fails, a model whose layers were reordered silently resumes with the moments of other layers."""
    trial = subject.mlp()
    trial.train(2)
    other = subject.mlp()
    other.optimizer = subject.optimizer(list(other.model.named_parameters())[::-1])
    with expect.working("loading into an optimizer with its parameters in a different order"):
        other.optimizer.load_state_dict(trial.optimizer.state_dict())
    expect.same(other.state(), trial.state(), "state loaded by name")
    saved = copy.deepcopy(trial.optimizer.state_dict())
    names = next(g["param_names"] for g in saved["param_groups"] if "3.bias" in g["param_names"])
    names[names.index("3.bias")] = "a.stranger"
    try:
        other.optimizer.load_state_dict(saved)
    except CheckpointError as error:
        assert "3.bias" in str(error), f"expected the error to name '3.bias', which the checkpoint lacks, found: {error}"
    else:
        raise AssertionError("expected a CheckpointError for '3.bias', which the checkpoint lacks; it was loaded")


def loaded_groups_are_obeyed(subject: Subject) -> None:
    """If this fails, schedulers have no effect after a resume, because the optimizer no longer reads its groups."""
    trial, still, fast = subject.mlp(), subject.mlp(), subject.mlp()
    trial.train(2)
    before = still.values()
    for t, lr in ((still, 0.0), (fast, 0.1)):
        with expect.working("loading a state dict"):
            t.optimizer.load_state_dict(trial.optimizer.state_dict())
        for group in t.optimizer.param_groups:
            group["lr"] = lr
        t.train(2)
    expect.moved(still.values(), fast.values(), "lr=0.1 instead of lr=0 after loading")
    if "modes" not in subject.capabilities:  # averaged weights keep moving at lr=0
        expect.same(still.values(), before, "two steps at lr=0 after loading")


def loading_shares_nothing(subject: Subject) -> None:
    """If this fails, optimizers that load the same state dict share their moments."""
    trial, other = subject.mlp(), subject.mlp()
    trial.train(2)
    saved = trial.optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    with expect.working("loading a state dict"):
        other.optimizer.load_state_dict(saved)
        other.train(2)
    for key, slots in before.items():
        expect.same(saved["state"][key], slots, f"the loaded state dict after two steps, parameter {key}")


def a_skipped_first_step_can_be_saved(subject: Subject) -> None:
    """If this fails, a mixed-precision run that is saved before its scale has settled cannot be resumed."""
    trial, other = subject.mlp(), subject.mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trial.optimizer.zero_grad()
    scaler.scale(pull(trial.params, 0) * float("inf")).backward()  # type: ignore[no-untyped-call]
    scaler.step(trial.optimizer)
    scaler.update()
    trial.optimizer.zero_grad()
    with expect.working("saving and loading after a step that the GradScaler skipped"):
        other.optimizer.load_state_dict(through_file(trial.optimizer.state_dict()))
    for t in (trial, other):
        t.train(3)
    expect.same_trial(other, trial, "resumed after a skipped first step")


CHECKS = (
    Check(loading_keeps_every_dtype_and_value, stored=True),
    Check(resuming_changes_no_bit, stored=True),
    Check(resuming_compiled_changes_no_bit, compiles=True),
    Check(saving_early_leaves_no_trace, stored=True),
    Check(the_dry_step_of_distributed_checkpoints_leaves_no_trace, stored=True),
    Check(parameters_without_a_gradient_are_saved, stored=True),
    Check(state_is_matched_by_name),
    Check(loaded_groups_are_obeyed),
    Check(loading_shares_nothing, stored=True),
    Check(a_skipped_first_step_can_be_saved, excludes=frozenset({"closure"})),  # a GradScaler does not support closures
)
