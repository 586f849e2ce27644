"""A HeavyBall state dict in torch's format, under hbcore's names: what the package's :data:`HEAVYBALL` consists of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hbcore import registry
from hbcore.checkpoint.foreign import unwrapped
from hbcore.errors import CheckpointError
from hbcore.migrate.heavyball import schedule, settings
from hbcore.migrate.heavyball.entry import Place, counts, entry_of
from hbcore.migrate.heavyball.naming import optimizer_of
from hbcore.migrate.heavyball.reading import View, read
from hbcore.migrate.heavyball.slots import Averages
from hbcore.migrate.source import Converted, Description, Note, Target

WHOLE = ("exp_avg", "exp_avg_sq", "exp_avg_fast", "momentum", "z", "fisher_approx", "d", "mars_old_grad")
"""Slots of the shape of their view, one of which every rule has."""

KIN = {"AdamW": ("AdamW", "Adam"), "AdamC": ("AdamC", "AdamW", "Adam")}
"""Optimizers whose state others can go on with."""


def describe(state_dict: Mapping[str, Any]) -> Description:
    """See :class:`hbcore.migrate.source.Source`."""
    state_dict = unwrapped(state_dict)
    groups = read(state_dict)
    name, hint = optimizer_of(groups)
    found = [settings.settings_of(group, name) | schedule.settings_of(state_dict, group) for group in groups]
    shapes = [[_shape(views) for views in group.params] for group in groups]
    needs = ""
    if any("schedule_free" in group.rules for group in groups):
        needs = "the schedule-free state is relative to the weights"
    elif any(len(views) > 1 for group in groups for views in group.params):
        needs = "the state of parameters that were cut into blocks does not tell their shapes"
    return Description(name, shapes, found, hint=hint, needs_weights=needs)


def _shape(views: list[View]) -> tuple[int, ...] | None:
    if len(views) != 1:
        return None
    slots = views[0].slots
    held = next((slots[name].value for name in WHOLE if name in slots), None)
    return tuple(held.shape) if isinstance(held, Tensor) else None


def convert(state_dict: Mapping[str, Any], target: Target) -> Converted:
    """See :class:`hbcore.migrate.source.Source`."""
    state_dict = unwrapped(state_dict)
    groups, core = read(state_dict), target.optimizer.core
    theirs, ours = counts(groups, list(core.groups))
    if theirs != ours:
        raise CheckpointError(
            f"the checkpoint has groups of {theirs} parameters, and {target.name} of {ours}; build it with the same groups, "
            "and without names if it sorts parameters by them."
        )
    name, hint = optimizer_of(groups)
    _check_kind(target, name, hint)
    training = not any(group.entries.get("train_mode") is False for group in groups)
    notes: dict[Note, None] = {}
    state, entries, progress = dict[Any, dict[str, Any]](), list[dict[str, Any]](), list[dict[str, float]]()
    for g, group in enumerate(groups):
        start = sum(theirs[:g])
        for i, views in enumerate(group.params):
            if views:
                at = Place(g, i, f"state[{group.keys[i]!r:.40}]")
                state[start + i], told = entry_of(group, at, Averages.of(group, core.settings.palm), training, target)
                notes |= dict.fromkeys(told)
        numbers = _numbers(settings.settings_of(group, name), target, g)
        entries.append({**numbers, "params": list(range(start, start + theirs[g]))})
        progress.append(schedule.progress(state_dict, group, target, g))
    options = tuple(inspect.signature(type(target.optimizer)).parameters)
    notes |= dict.fromkeys(settings.notes_of(groups, entries, options))
    if not schedule.refreshes(state_dict)[1] and any(f"{r}.refreshes" in p for p in progress for r in schedule.FITTED):
        notes[Note("assumed", "refreshes", "the checkpoint does not tell how often; it is the optimizer's default")] = None
    return Converted({"state": state, "param_groups": entries}, list(notes), progress, training)


def _check_kind(target: Target, name: str | None, hint: Sequence[str]) -> None:
    """Raise unless the target's state means what that of the optimizer ``name`` does, or of one of ``hint``."""
    names = [registry.info(name).name] if name else list(hint)
    mine = {cls.__name__ for cls in type(target.optimizer).__mro__}
    if names and not mine & {relative for one in names for relative in KIN.get(one, (one,))}:
        raise CheckpointError(
            f"the checkpoint is of {' or '.join(names)}, and {target.name}'s state means something else: convert it for "
            f"{names[0]}."
        )


def _numbers(found: Mapping[str, Any], target: Target, g: int) -> dict[str, Any]:
    """The entries of hbcore's group: those of the checkpoint that may differ from step to step."""
    group = target.optimizer.param_groups[g]
    known = target.optimizer.core.chain.dynamic(group)
    betas: tuple[float, ...] = found["betas"] if settings.is_pair(found.get("betas")) else ()
    beta = found["beta"] if found.get("beta") is not None else next(iter(betas), None)
    mine = {k: v for k, v in found.items() if k in known}
    own = {"alpha": betas[1]} if "alpha" in known and "alpha" not in mine and len(betas) > 1 else {"momentum": beta}
    mine |= {k: v for k, v in {**own, "beta": beta}.items() if k in known}  # RMSprop has an alpha, and no momentum
    return {k: v for k, v in mine.items() if v is not None}
