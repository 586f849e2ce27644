"""torch.optim: whichever of its optimizers an installed optimizer declares as its counterpart.

``optimizer.load_state_dict`` takes these state dicts as they are; this is for files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hbcore import registry
from hbcore.checkpoint.counterpart import HOW, Counterpart, counterpart_of, received
from hbcore.errors import CheckpointError, HbcoreError
from hbcore.migrate.forms import SCHEDULERS, Group, is_wide, parts_of, shape_of
from hbcore.migrate.plain import number
from hbcore.migrate.source import Converted, Description, Note, Source, Target

SOME = frozenset({*HOW, "maximize", "differentiable", "decoupled_weight_decay"})
"""Entries that only some versions of torch have."""


def counterparts() -> Iterator[tuple[str, Counterpart]]:
    """The installed optimizers that have a counterpart, and it."""
    for name in registry.list_optimizers():
        try:
            cls: Any = registry.resolve(name)
        except HbcoreError:
            continue  # its plugin is broken, which is for others to say
        if isinstance(cls, type) and (found := counterpart_of(cls)) is not None:
            yield name, found


def candidates(groups: Sequence[Group]) -> list[tuple[str, Counterpart]]:
    """The counterparts whose groups have these entries: Adam and AdamW have the same, and tell by the kind of their decay."""
    return [(n, c) for n, c in counterparts() if (d := c.defaults()) and all(_alike(c, {*d}, group) for group in groups)]


def _alike(counterpart: Counterpart, entries: set[str], group: Group) -> bool:
    key = "decoupled_weight_decay"
    ours = counterpart.structure.get(key)
    other = key in entries and ours is not None and group.get(key, ours) != ours
    settable = "momentum_decay" in entries  # NAdam's decay is either, as ours is
    return {*group} - SCHEDULERS - SOME == entries - SOME and (settable or not other)


def recognises(state_dict: Any) -> bool:
    """Whether some counterpart saves such groups."""
    parts = parts_of(state_dict)
    return parts is not None and bool(candidates(parts[0]))


def describe(state_dict: Mapping[str, Any]) -> Description:
    """See :class:`hbcore.migrate.source.Source`. Two candidates are no optimizer: ``hint`` has their names."""
    groups, state = _parts(state_dict)
    found = candidates(groups)
    structure = found[0][1].structure if found else {}
    settings = [{**structure, **{k: number(v) for k, v in g.items() if k not in {*SCHEDULERS, *HOW}}} for g in groups]
    shapes = [[shape_of(_slots(state.get(key))) for key in group["params"]] for group in groups]
    wide = [(g, i) for g, group in enumerate(groups) for i, key in enumerate(group["params"]) if is_wide(state.get(key))]
    named = [group.get("param_names") for group in groups]
    names = tuple(name for name, _ in found)
    dtypes = dict.fromkeys(wide, torch.float64)
    one = names[0] if len(names) == 1 else None
    return Description(one, shapes, settings, named if any(named) else (), names, dtypes=dtypes)


def convert(state_dict: Mapping[str, Any], target: Target) -> Converted:
    """See :class:`hbcore.migrate.source.Source`."""
    groups, _ = _parts(state_dict)
    core, counterpart = target.optimizer.core, counterpart_of(type(target.optimizer))
    fits = [name for name, _ in candidates(groups)]
    if counterpart is None or target.name not in fits:
        raise CheckpointError(
            f"it is of torch.optim's {' or '.join(fits) or 'others'}, whose rule is not that of {target.name}."
        )
    if len(groups) != len(core.groups):
        raise CheckpointError(f"the checkpoint has {len(groups)} param groups, and {target.name} {len(core.groups)}.")
    read = received(core, counterpart, state_dict)
    made: dict[str, Any] = {"state": {}, "param_groups": []}
    notes: list[Note] = []
    for g, group in enumerate(read["param_groups"]):
        kept = {k: number(v) for k, v in group.items() if k in core.chain.keys or k in SCHEDULERS}
        made["param_groups"].append(kept)
        notes += [Note("mapped", f"param_groups[{g}][{k!r}]", f"{v!r:.60}") for k, v in kept.items() if k != "params"]
        gone = sorted(map(str, {*groups[g]} - {*kept}))
        notes += [Note("dropped", f"param_groups[{g}][{k!r}]", "read, and has no entry of its name in hbcore") for k in gone]
        for i, key in enumerate(group["params"]):
            if slots := _slots(read["state"].get(key)):
                known = {} if i >= len(core.groups[g]["params"]) else target.slots(g, i)
                if unknown := sorted({*slots} - {*known, "step"}):
                    raise CheckpointError(
                        f"param_groups[{g}]['params'][{i}] has state {unknown[0]!r}, which no rule here uses."
                    )
                made["state"][key] = {"step": 1.0, **slots}
    names = sorted({name for entry in made["state"].values() for name in entry})
    return Converted(made, [*notes, *(Note("mapped", f"state[...][{name!r}]", repr(name)) for name in names)])


def _parts(state_dict: Any) -> tuple[list[Group], Mapping[Any, Any]]:
    parts = parts_of(state_dict)
    if parts is None:
        raise CheckpointError(
            "it is no state dict of torch.optim's: expected 'state' and a list of 'param_groups' with 'params'."
        )
    return parts


def _slots(entry: Any) -> dict[str, Any]:
    """A parameter's state without what torch has as None before the first step."""
    found = {k: v for k, v in (entry or {}).items() if v is not None}
    step = number(found.get("step"))
    if "step" in found and (isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 <= step < 2**53):
        raise CheckpointError(f"a parameter's step is {step!r:.60}; expected a count.")
    if strange := [name for name, value in found.items() if name != "step" and not isinstance(value, Tensor)]:
        raise CheckpointError(f"a parameter's state {strange[0]!r} is {found[strange[0]]!r:.60}; expected a tensor.")
    return found if step is None else {**found, "step": float(step)}


TORCH = Source("torch", recognises, describe, convert)
