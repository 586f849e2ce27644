"""Checks of untrusted and damaged checkpoints: rejected as a whole, or treated as plain data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import CheckpointError
from hbcore.testing import expect
from hbcore.testing.subject import Check, Subject, Trial

Saved = dict[str, Any]


def a_state_that_does_not_fit_is_refused(subject: Subject) -> None:
    """If this fails, a wrong or damaged checkpoint corrupts training, or fails long after it was loaded."""
    trial = subject.mlp()
    trial.train(2)
    sound = copy.deepcopy(trial.optimizer.state_dict())
    trial.train(1)
    before = copy.deepcopy((trial.values(), trial.state(), trial.numbers()))
    for what, spoil in SPOILED.items():
        saved = copy.deepcopy(sound)
        if not spoil(saved):
            continue  # the optimizer's state has no tensors to spoil
        try:
            trial.optimizer.load_state_dict(saved)
        except CheckpointError:
            pass
        except Exception as error:
            raise AssertionError(f"{what}: expected a CheckpointError, found {type(error).__name__}: {error}") from error
        else:
            raise AssertionError(f"{what}: expected a CheckpointError; it was loaded")
        _expect_unchanged(trial, before, what)


def _expect_unchanged(trial: Trial, before: tuple[Any, Any, list[dict[str, Any]]], what: str) -> None:
    values, state, numbers = before
    expect.same(trial.values(), values, f"{what}, refused")
    expect.same(trial.state(), state, f"{what}, refused")
    for g, (found, wanted) in enumerate(zip(trial.numbers(), numbers, strict=True)):
        expect.same(found, wanted, f"{what}, refused, param group {g}")


def _first_tensor(saved: Saved) -> tuple[dict[str, Any], str] | None:
    """A non-scalar slot in the saved state of some parameter."""
    for slots in saved["state"].values():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.ndim:
                return slots, name
    return None


def _slot(change: Callable[[dict[str, Any], str], object]) -> Callable[[Saved], bool]:
    def spoil(saved: Saved) -> bool:
        found = _first_tensor(saved)
        if found is not None:
            change(*found)
        return found is not None

    return spoil


def _group(key: str, value: Any) -> Callable[[Saved], bool]:
    def spoil(saved: Saved) -> bool:
        saved["param_groups"][0][key] = value
        return True

    return spoil


def _without(key: str) -> Callable[[Saved], bool]:
    return lambda saved: saved.pop(key) is not None


SPOILED: dict[str, Callable[[Saved], bool]] = {
    "state of the wrong shape": _slot(lambda slots, name: slots.update({name: torch.zeros(2, 5, 7)})),
    "state that lacks a slot": _slot(lambda slots, name: slots.pop(name)),
    "state that is not a tensor": _slot(lambda slots, name: slots.update({name: "zeros"})),
    "state without param_groups": _without("param_groups"),
    "param groups without state": _without("state"),
    "lr=nan": _group("lr", math.nan),
    "lr=-1": _group("lr", -1.0),
    "weight_decay=nan": _group("weight_decay", math.nan),
    "lr of the wrong type": _group("lr", "high"),
    "parameters of a larger model": _group("params", list(range(99))),
    "garbage as metadata": _group("hbcore", "__import__('os')"),
}
"""Defect of a state dict -> function that introduces it, and returns False if there is nothing to spoil."""


def names_of_attributes_are_only_keys(subject: Subject) -> None:
    """If this fails, a checkpoint of plain data can replace the optimizer's methods, or run code."""
    plain = subject.mlp()
    plain.train(2)
    for key in ("__class__", "__dict__", "step", "state", "load_state_dict", "_plan"):
        trial = subject.mlp()
        trial.train(1)
        saved = copy.deepcopy(trial.optimizer.state_dict())
        saved["param_groups"][0][key] = "from the checkpoint"
        with suppress(CheckpointError):  # rejecting it is fine too
            trial.optimizer.load_state_dict(saved)
        assert type(trial.optimizer) is type(plain.optimizer), f"the key {key!r} of a loaded group changed the class"
        found = vars(trial.optimizer).get(key)
        assert found != "from the checkpoint", f"the key {key!r} of a loaded group became an attribute of the optimizer"
        with expect.working(f"a step after loading a group with the key {key!r}"):
            trial.train(1)
        expect.same(trial.values(), plain.values(), f"a step after loading a group with the key {key!r}")


CHECKS = (
    Check(a_state_that_does_not_fit_is_refused, stored=True),
    Check(names_of_attributes_are_only_keys),
)
