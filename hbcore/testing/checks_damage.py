"""Damaged checkpoints, drawn at random: each is refused as a whole, or loaded as a whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import CheckpointError, StateWarning
from hbcore.testing.damage import damaged
from hbcore.testing.damage_state import Damage, Saved
from hbcore.testing.subject import Check, Subject, Trial

SHAPES = ((2, 32), (5,), (3, 2, 2), ())
COUNT = 20
"""How many damaged checkpoints the check tries: others for each optimizer, the same in each run."""


def a_damaged_state_is_refused_or_loads_whole(subject: Subject) -> None:
    """If this fails, a truncated or edited checkpoint is loaded in part, or a refused one leaves a changed optimizer behind."""
    patient = Patient(subject)
    for i in range(COUNT):
        patient.survives(Random(f"{subject} {i}"))


class Patient:
    """An optimizer into which damaged state dicts are loaded: with or without state of its own.

    Args:
        subject: the optimizer.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.idle: dict[int, Trial] = {}  # steps taken -> a trial that refused, and so is as good as new

    @cached_property
    def sound(self) -> Saved:
        """A state dict as it was saved."""
        trial = self.trial(3)
        sound: Saved = copy.deepcopy(trial.optimizer.state_dict())
        return sound

    @cached_property
    def next(self) -> dict[int, Any]:
        """Steps taken -> everything after one more, where nothing was loaded."""
        found = {}
        for steps in (0, 2):
            trial = self.trial(steps)
            trial.train(1)
            found[steps] = everything(trial)
        return found

    def trial(self, steps: int) -> Trial:
        """The optimizer after so many steps."""
        shapes = tuple(s for s in SHAPES if s) if "sparse" in self.subject.capabilities else SHAPES
        trial = self.subject.loose(*shapes)
        trial.train(steps)
        return trial

    def survives(self, random: Random) -> None:
        """Load one damaged state dict, and expect that it is refused as a whole, or loaded as a whole."""
        steps, then_trains = random.choice((0, 2)), random.random() < 0.25
        spoiled, faults = damaged(self.sound, random)
        trial, given = self.idle.pop(steps, None) or self.trial(steps), copy.deepcopy(spoiled)
        what = "; ".join(fault.what for fault in faults) or "nothing damaged"
        before = everything(trial)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                trial.optimizer.load_state_dict(given)
            except CheckpointError as error:
                _expect_named(str(error), faults, what)
                _expect_same(everything(trial), before, f"{what}, refused")
                if then_trains:
                    trial.train(1)
                    _expect_same(everything(trial), self.next[steps], f"{what}, refused, and a step")
                else:
                    self.idle[steps] = trial
                return
            except Exception as error:
                raise AssertionError(f"{what}: expected a CheckpointError, found {type(error).__name__}: {error}") from error
        warned = "\n".join(str(w.message) for w in heard if issubclass(w.category, StateWarning))
        for loss, name in losses(self.sound, spoiled, trial.optimizer):
            assert name in warned, f"{what}: expected a CheckpointError, or a StateWarning about {name!r}; found that {loss}"


def losses(sound: Saved, spoiled: Saved, optimizer: Any) -> Iterator[tuple[str, str]]:
    """What of a state dict was not loaded, and by which name a warning should call it.

    Args:
        sound: the state dict before it was damaged.
        spoiled: as it was loaded.
        optimizer: it has loaded it.
    """
    covered, after = set(), optimizer.state_dict()
    for g, (ours, theirs, old) in enumerate(
        zip(after["param_groups"], spoiled["param_groups"], sound["param_groups"], strict=True)
    ):
        names, keys = ours["param_names"], list(theirs["params"])
        by_name = dict(zip(theirs.get("param_names") or names, keys, strict=True))
        for name, mine, was in zip(names, ours["params"], old["params"], strict=True):
            covered.add(by_name[name])
            found = after["state"].get(mine, {})
            yield from _slots(name, sound["state"].get(was, {}), spoiled["state"].get(by_name[name], {}) or {}, found)
        for key in {*_numbers(optimizer, g), *(set(theirs) - set(old))} - {"params", "param_names", "hbcore", "train_mode"}:
            if key not in theirs:
                yield f"group {g} keeps a {key!r} of its own", str(key)
            elif bits(theirs[key]) != bits(ours.get(key)) and not _equal(theirs[key], ours.get(key)):
                yield f"{key!r} of group {g} is {ours.get(key)!r}, not {theirs[key]!r}", str(key)
    for key in set(spoiled["state"]) - covered:
        if key not in after["state"]:
            yield f"the state of {key!r} is nowhere", str(key)


def _slots(
    name: str, sound: Mapping[str, Any], given: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    for slot in sound:
        if given.get(slot) is None:
            yield f"{slot!r} of {name!r} was missing", _of(slot)
    for slot, value in given.items():
        if value is None:
            continue
        if slot not in found:
            yield f"{slot!r} of {name!r} was left out", _of(slot)
        elif not _equal(value, found[slot]):
            yield f"{slot!r} of {name!r} is {found[slot]!r:.60}, not {value!r:.60}", _of(slot)


def _of(part: Any) -> str:
    """The slot of a codec's tensor, by which warnings call it."""
    return str(part).partition("#")[0]


def _numbers(optimizer: Any, g: int) -> set[str]:
    """The entries of a group that are taken from the checkpoint: structure is the optimizer's own."""
    group = optimizer.param_groups[g]
    for child in getattr(optimizer, "children", [optimizer]):
        if any(own is group for own in child.param_groups):
            return {"lr", *child.core.chain.dynamic(group)}
    return {"lr"}


def everything(trial: Trial) -> Any:
    """A trial's parameters, state and groups, down to the bits."""
    saved = trial.optimizer.state_dict()
    return bits({"parameters": trial.values(), **saved, "live": [dict(g, params=None) for g in trial.optimizer.param_groups]})


def bits(value: Any) -> Any:
    """A value in a form that ``==`` compares bit for bit, NaN and the types of numbers included."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta:
            return str(value.layout), str(value.device), tuple(value.shape)
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).tolist() if value.numel() else []
        return str(value.dtype), tuple(value.shape), raw
    if isinstance(value, Mapping):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(bits, value)]
    return type(value).__name__, repr(value)


def _equal(given: Any, found: Any) -> bool:
    """Whether a loaded value is the one that was given, in whatever dtype and with whatever dimensions of size 1."""
    if isinstance(given, Tensor) and isinstance(found, Tensor):
        if given.layout is not torch.strided:
            given = given.to_dense()
        alike = [n for n in given.shape if n != 1] == [n for n in found.shape if n != 1]
        return alike and torch.equal(*(t.detach().double().nan_to_num(1e300, 2e300, 3e300).flatten() for t in (given, found)))
    if isinstance(given, Tensor) or isinstance(found, Tensor):
        one, other = (float(v) if isinstance(v, (Tensor, int, float)) else v for v in (given, found))
        return bool(one == other)
    return bool(bits(given) == bits(found) or (given == found and not isinstance(given, bool)))


def _expect_same(found: Any, wanted: Any, what: str) -> None:
    for key in wanted:
        assert found[key] == wanted[key], f"{what}: expected {key!r} as it was, bit for bit; found it changed"


def _expect_named(told: str, faults: list[Damage], what: str) -> None:
    names = [name for fault in faults for name in fault.names]
    assert not names or any(name in told for name in names), (
        f"{what}: expected an error that names one of {', '.join(map(repr, names))}, found {told!r}"
    )


CHECKS = (Check(a_damaged_state_is_refused_or_loads_whole, stored=True),)
