"""What an optimizer is called elsewhere: state dicts of torch.optim's optimizer of the same rule, in our names and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbcore.checkpoint import schema
from hbcore.engine.core import OptimizerCore
from hbcore.engine.graph.segment_spec import Hypers
from hbcore.errors import CheckpointError, HyperparameterError, StateWarning
from hbcore.rules import route
from hbcore.warn import warn_at_caller

Entries = Mapping[str, Any]

HOW = ("foreach", "fused", "capturable")
"""Entries of torch's groups that say how a step runs, not what it computes."""

INSERTED = frozenset({"weight_decay", "lr", "apply"})
"""Transforms that surround every rule, torch's too."""


@dataclass(frozen=True)
class Counterpart:
    """The optimizer of torch.optim that has an optimizer's rule; a class attribute of :class:`hbcore.Optimizer`.

    State and group entries of the same name need no mention. A subclass that overrides ``chain`` has another rule, and no
    counterpart unless it declares one.

    Args:
        name: the class in torch.optim; a torch that lacks it is not an error.
        structure: options and entries of either side, and the values at which both have the same rule, where the other side has
            no such entry: ``{"decoupled_weight_decay": False}`` of an SGD that always couples its decay.
        computed: torch's state that ours computes from ``(group, step)``: a function that returns a number.
        whole_steps: torch counts steps in an int.
        reads: torch's group and ours -> torch's group in our names and forms; what is the same in two forms in ours.
        writes: our group -> it in torch's names and forms, without what they cannot express.
    """

    name: str
    structure: Entries = field(default_factory=dict)
    computed: Mapping[str, Callable[[Entries, float], float]] = field(default_factory=dict)
    whole_steps: bool = False
    reads: Callable[[Entries, Entries], dict[str, Any]] | None = None
    writes: Callable[[Entries], dict[str, Any]] | None = None

    def defaults(self) -> Entries:
        """The entries of a group of torch's and their defaults; empty if this torch has no such class."""
        theirs = getattr(torch.optim, self.name, None)
        return {} if theirs is None else dict(theirs([torch.zeros(1, 1)]).defaults)


def counterpart_of(cls: type[Any]) -> Counterpart | None:
    """The counterpart of a class's rule: its own, or that of the base whose ``chain`` it has."""
    for base in cls.__mro__:
        if isinstance(found := vars(base).get("counterpart"), Counterpart):
            return found
        if "chain" in vars(base):
            return None
    return None


def received(core: OptimizerCore, counterpart: Counterpart | None, state_dict: Entries) -> Entries:
    """A state dict whose groups from torch.optim have our names; others, and malformed ones, as they are.

    Warns, with :class:`StateWarning`, of what changes the rule and is set differently here.

    Raises:
        CheckpointError: an entry has a form that torch's optimizer does not give it.
    """
    if counterpart is None:
        return state_dict
    groups, state = list(state_dict["param_groups"]), dict(state_dict["state"])
    for g, (theirs, ours) in enumerate(zip(groups, core.groups, strict=True)):
        if theirs.get(schema.KEY) is not None:
            continue
        try:
            groups[g] = entries = _entries(core, counterpart, theirs, ours, g)
            for key in theirs["params"]:
                if isinstance(entry := state.get(key), Mapping) and entry:
                    state[key] = _slots(core, counterpart, entry, entries, g)
        except (HyperparameterError, TypeError, ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{core.name}: param group {g} is not torch.optim.{counterpart.name}'s ({error}).") from None
    return {**state_dict, "state": state, "param_groups": groups}


def _entries(core: OptimizerCore, counterpart: Counterpart, theirs: Entries, ours: Entries, g: int) -> dict[str, Any]:
    """A group of torch's in our names, without what ours has no use for."""
    read = dict(theirs) if counterpart.reads is None else counterpart.reads(theirs, ours)
    dynamic = core.chain.dynamic(dict(ours))
    structural = {k for k in core.chain.keys if k not in dynamic and k in read}
    for k in sorted({*structural, *counterpart.structure, "differentiable"}):
        there, here = _either(counterpart, k, read, ours)
        if there != here and _matters(k, read):
            warn_at_caller(
                f"{core.name}: param group {g} of the checkpoint, taken for torch.optim.{counterpart.name}'s, has "
                f"{k}={there!r}, and this optimizer goes on with {here!r}" + _hint(k, there, core),
                StateWarning,
            )
    idle = {*HOW, *counterpart.structure, "differentiable"}.difference(core.chain.keys)
    return {k: v for k, v in read.items() if k not in idle}


def _either(counterpart: Counterpart, key: str, read: Entries, ours: Entries) -> tuple[Any, Any]:
    """An entry of both sides; where one has none, its rule's constant."""
    same = counterpart.structure.get(key, False)
    return _plain(read.get(key, same)), _plain(ours.get(key, same))


def _hint(key: str, value: Any, core: OptimizerCore) -> str:
    if key in core.chain.keys:
        return f"; construct it with {key}={value!r} to continue as torch would."
    return ", which is its rule; another optimizer has the other one."


def _matters(key: str, group: Entries) -> bool:
    return key != "decoupled_weight_decay" or bool(group.get("weight_decay", 0))


def _slots(core: OptimizerCore, counterpart: Counterpart, entry: Entries, group: Entries, g: int) -> dict[str, Any]:
    """A parameter's state in torch's form in ours."""
    slots = dict(entry)
    for name, compute in counterpart.computed.items():
        held, step = _number(slots.pop(name, None)), _number(slots.get("step"))
        if held is None or step is None or step < 0:
            continue
        expected = compute(group, step)
        if abs(held - expected) > 1e-3 * abs(expected):
            warn_at_caller(
                f"{core.name}: {name!r} is {held:.6g} in param group {g} of the checkpoint; this optimizer computes "
                f"{expected:.6g} from the present hyperparameters, which a scheduler must have changed.",
                StateWarning,
            )
    return slots


def sent(core: OptimizerCore, counterpart: Counterpart, whole: Entries) -> dict[str, Any]:
    """A state dict of decoded slots under our names, with param groups as saved, in the form of torch's optimizer.

    Parameters that have not stepped are left to torch, which starts them in its first step. Warns, with :class:`StateWarning`,
    of what changes the rule and torch does not know.
    """
    defaults, state, groups = counterpart.defaults(), {}, []
    for g, ours in enumerate(whole["param_groups"]):
        core_group = core.groups[g]
        written = dict(ours) if counterpart.writes is None else counterpart.writes(ours)
        gone = [f"{k}={ours[k]!r}" for k in defaults if k in ours and k not in written]
        if lost := [*gone, *_lost(core, counterpart, ours, core_group, defaults)]:
            warn_at_caller(
                f"{core.name}: torch.optim.{counterpart.name} has no counterpart of {', '.join(lost)} in param group {g}, and "
                "goes on without.",
                StateWarning,
            )
        entries = {k: v for k, v in written.items() if k not in core.chain.keys}
        entries.update({k: written.get(k, counterpart.structure.get(k, v)) for k, v in defaults.items()})
        if "capturable" in defaults:
            entries["capturable"] = core.settings.capturable
        groups.append(entries if defaults else written)
        for key in ours["params"]:
            entry = dict(whole["state"].get(key, {}))
            if not entry or not (step := float(entry["step"])):
                continue
            if counterpart.whole_steps:
                entry["step"] = int(step)
            for name, compute in counterpart.computed.items():
                entry[name] = torch.full_like(entry["step"], compute(ours, step), dtype=torch.get_default_dtype())
            state[key] = entry
    return {"state": state, "param_groups": groups}


def _lost(
    core: OptimizerCore, counterpart: Counterpart, ours: Entries, group: dict[str, Any], defaults: Entries
) -> Iterator[str]:
    """What our group computes and torch's does not, for a message."""
    for k, value in counterpart.structure.items():
        if k in ours and k not in defaults and _plain(ours[k]) != _plain(value) and _matters(k, ours):
            yield f"{k}={ours[k]!r}"
    own = {t.name for t in route.every(core.chain.rule(Hypers(**core.chain.usual(group))))}
    yield from (name for name in dict.fromkeys(t.name for t in core.chain.every(group)) if name not in own | INSERTED)
    yield from (k for k in ("cautious_weight_decay", "palm") if getattr(core.settings, k))
    if ours.get("warmup_steps"):
        yield f"warmup_steps={ours['warmup_steps']!r}"


def _number(value: Any) -> float | None:
    """The number that state holds; None for anything else, which is for the reader to refuse."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None


def _plain(value: Any) -> Any:
    """An entry in a form that compares: what a checkpoint has as a list may be a tuple here."""
    if isinstance(value, Tensor):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value
