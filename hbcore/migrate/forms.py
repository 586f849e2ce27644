"""Sources as tables: what each optimizer of a library saves, and which of hbcore's has the same rule, if one has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import CheckpointError, StateWarning
from hbcore.migrate.plain import number
from hbcore.migrate.source import Converted, Description, Note, Source, Target
from hbcore.warn import warn_at_caller

Group = Mapping[str, Any]
Shape = tuple[int, ...] | None
Names = frozenset[str]

SCHEDULERS = frozenset({"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"})
"""Entries of a group that are not the optimizer's."""


@dataclass(frozen=True)
class Form:
    """One optimizer of a library.

    Args:
        name: the library's name for it.
        entries: what its groups have, each of them one of these sets; besides ``optional`` and what schedulers add.
        slots: what the state of a parameter has, each of them one of these sets.
        ours: the group entries -> the name of hbcore's optimizer; None if hbcore has not the same rule.
        differs: what differs then: the end of a sentence.
        optional: entries that some versions or arguments add.
        settings: a group and its parameters' shapes -> its entries under hbcore's names, structure and numbers. Raises
            CheckpointError for a setting that hbcore's rule has not, by :func:`require`.
        renamed: a parameter's slots -> those with another name in hbcore; None for one that it has no use for.
        relative: slots that follow from others and the weights: a function of the entry, the weights and the group.
        steps: a group and a parameter's state -> its count of steps.
        progress: a group -> the numbers that it carries from step to step.
        training: whether a group's weights are those to train with.
        becomes: entries and slots that are carried over in another form, and what they become, for the report.
        assumed: what its checkpoints do not tell.
    """

    name: str
    entries: tuple[Names, ...]
    slots: tuple[Names, ...]
    ours: Callable[[Sequence[Group]], str] | None = None
    differs: str = ""
    optional: Names = frozenset()
    settings: Callable[[Group, Sequence[Shape]], dict[str, Any]] = lambda group, shapes: {}
    renamed: Callable[[Mapping[str, Any]], Mapping[str, str | None]] = lambda entry: {}
    relative: Callable[[Mapping[str, Any], Tensor, Group], dict[str, Tensor]] | None = None
    steps: Callable[[Group, Mapping[str, Any]], float] = lambda group, entry: group.get("step", 1)
    progress: Callable[[Group], dict[str, float]] = lambda group: {}
    training: Callable[[Group], bool] = lambda group: True
    becomes: Mapping[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    def fits(self, groups: Sequence[Group], state: Mapping[Any, Any]) -> bool:
        """Whether groups and state have exactly what this optimizer saves."""
        free = SCHEDULERS | self.optional
        kinds = ({*group} - free in [names - free for names in self.entries] for group in groups)
        return all(kinds) and all({*entry} in self.slots for entry in state.values() if entry)


def names(text: str) -> Names:
    """A set of names, from a line of them."""
    return frozenset(text.split())


def require(form: str, group: Group, **neutral: Any) -> None:
    """Raise CheckpointError unless the group's entries of these names have these values: the rule is another otherwise."""
    for key, value in neutral.items():
        if number(group.get(key, value)) != value:
            raise CheckpointError(f"{form} with {key}={group[key]!r:.40} is not supported: hbcore's rule is {key}={value!r}'s.")


def source(library: str, forms: Sequence[Form], recognises: Callable[[Group], bool] = lambda group: False) -> Source:
    """The source of a library whose optimizers have these forms.

    Args:
        library: its name.
        forms: those that can be converted, and those that cannot, by name.
        recognises: whether a group is the library's, though of an optimizer that has no form.
    """

    def known(state_dict: Any) -> bool:
        parts = parts_of(state_dict)
        if parts is None:
            return False
        groups, state = parts
        return any(form.fits(groups, state) for form in forms) or any(recognises(group) for group in groups)

    def described(state_dict: Mapping[str, Any]) -> Description:
        form, groups, state = chosen(library, forms, state_dict)
        assert form.ours is not None
        shapes = [[shape_of(state.get(key)) for key in group["params"]] for group in groups]
        pairs = enumerate(zip(groups, shapes, strict=True))
        settings = shared([settings_of(library, form, g, group, mine) for g, (group, mine) in pairs])
        wide = [(g, i) for g, group in enumerate(groups) for i, key in enumerate(group["params"]) if is_wide(state.get(key))]
        named = [group.get("param_names") for group in groups]
        needed = f"{library}'s {form.name} keeps weights, and hbcore their difference from the model's" if form.relative else ""
        found, dtypes = named if any(named) else (), dict.fromkeys(wide, torch.float64)
        return Description(form.ours(groups), shapes, settings, found, needs_weights=needed, dtypes=dtypes)

    def converted(state_dict: Mapping[str, Any], target: Target) -> Converted:
        form, groups, state = chosen(library, forms, state_dict)
        assert form.ours is not None
        if (wanted := form.ours(groups)) != target.name:
            raise CheckpointError(
                f"it is {library}'s {form.name}, whose rule hbcore has in {wanted}, and not in {target.name}."
            )
        made: dict[str, Any] = {"state": {}, "param_groups": []}
        index = 0
        for g, group in enumerate(groups):
            fitted(library, form, g, group, [shape_of(state.get(key)) for key in group["params"]], target, made)
            for i, key in enumerate(group["params"]):
                if entry := state.get(key):
                    made["state"][index + i] = slots_of(library, form, g, i, entry, group, target)
            made["param_groups"][-1]["params"] = list(range(index, index := index + len(group["params"])))
        progress = [form.progress(group) for group in groups]
        return Converted(made, notes_of(form, groups, state), progress, all(map(form.training, groups)))

    return Source(library, known, described, converted)


def parts_of(state_dict: Any) -> tuple[list[Group], Mapping[Any, Any]] | None:
    """The groups and the state of what has torch's layout; None for anything else."""
    if not isinstance(state_dict, Mapping):
        return None
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, (list, tuple)) or not isinstance(state, Mapping) or not groups:
        return None
    if not all(isinstance(g, Mapping) and isinstance(g.get("params"), (list, tuple)) for g in groups):
        return None
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(key, (int, str)) for key in keys) or len({*keys}) != len(keys):
        return None
    return (list(groups), state) if all(isinstance(e, Mapping) for e in state.values()) else None


def chosen(library: str, forms: Sequence[Form], state_dict: Any) -> tuple[Form, list[Group], Mapping[Any, Any]]:
    """The form of a state dict, and its parts.

    Raises:
        CheckpointError: it has none, or one that hbcore has no rule for.
    """
    parts = parts_of(state_dict)
    if parts is None:
        raise CheckpointError(
            f"it is no state dict of {library}'s: expected 'state' and a list of 'param_groups' with 'params'."
        )
    groups, state = parts
    form = next((form for form in forms if form.fits(groups, state)), None)
    if form is None:
        held = sorted({name for entry in state.values() for name in map(str, entry)})
        raise CheckpointError(
            f"it is of none of {library}'s optimizers that hbcore converts ({', '.join(f.name for f in forms if f.ours)}): its "
            f"groups have {', '.join(sorted(map(str, groups[0])))}; its state {', '.join(held) or 'nothing'}."
        )
    if form.ours is None:
        raise CheckpointError(f"{library}'s {form.name} cannot be converted: {form.differs}.")
    return form, groups, state


def settings_of(library: str, form: Form, g: int, group: Group, shapes: Sequence[Shape]) -> dict[str, Any]:
    """A group's entries under hbcore's names."""
    try:
        return {k: number(v) for k, v in form.settings(group, shapes).items()}
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"param_groups[{g}] is not of {library}'s {form.name} ({type(error).__name__}: {error})."
        ) from None


def shared(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings with those that a group says nothing of as the first group with them has them: constructors set them for all."""
    known: dict[str, Any] = {}
    for one in settings:
        known = {**one, **known}
    return [{**known, **one} for one in settings]


def fitted(
    library: str, form: Form, g: int, group: Group, shapes: Sequence[Shape], target: Target, made: dict[str, Any]
) -> None:
    """Add a group's numbers to the result, and warn of structure that the target has otherwise."""
    core = target.optimizer.core
    ours = core.groups[g] if g < len(core.groups) else {}
    dynamic = core.chain.dynamic(ours) if ours else {}
    settings = settings_of(library, form, g, group, shapes)
    for key in sorted(k for k in settings if k in core.chain.keys and k not in dynamic and k in ours):
        if settings[key] != number(ours[key]):
            warn_at_caller(
                f"{library}'s {form.name} has {key}={settings[key]!r} in param group {g}, and this {target.name} goes on with "
                f"{ours[key]!r}; construct it with {key}={settings[key]!r} to continue as it would.",
                StateWarning,
            )
    kept = {k: number(v) for k, v in group.items() if k in SCHEDULERS - {"params"}}
    made["param_groups"].append({**{k: v for k, v in settings.items() if k in core.chain.keys}, **kept})


def slots_of(
    library: str, form: Form, g: int, i: int, entry: Mapping[str, Any], group: Group, target: Target
) -> dict[str, Any]:
    """A parameter's state under hbcore's names."""
    where = f"{library}'s {form.name}, param_groups[{g}]['params'][{i}]"
    slots: dict[str, Any] = {}
    for name, value in entry.items():
        ours = form.renamed(entry).get(name, name)
        if ours is not None and name != "step":
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{where}: {name!r} is {value!r:.60}; expected a tensor.")
            slots[ours] = value
    if form.relative is not None:
        param = target.param(g, i).detach()
        if any(t.shape != param.shape for t in slots.values()):
            raise CheckpointError(f"{where} has state of another shape than the weights, {tuple(param.shape)}.")
        slots.update(form.relative(entry, param, group))
    step = number(form.steps(group, entry))
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 <= step < 2**53:
        raise CheckpointError(f"{where}: step is {step!r:.60}; expected a count.")
    known = target.slots(g, i)
    return {"step": float(step), **{name: value for name, value in slots.items() if name in known}}


def notes_of(form: Form, groups: Sequence[Group], state: Mapping[Any, Any]) -> list[Note]:
    """What became of each entry."""
    found: list[Note] = []
    for g, group in enumerate(groups):
        settings = form.settings(group, [shape_of(state.get(key)) for key in group["params"]])
        for key in sorted({*map(str, group)} - {"params"}):
            where = f"param_groups[{g}][{key!r}]"
            if key in form.becomes:
                found.append(Note("mapped", where, form.becomes[key]))
            elif key in settings or key in SCHEDULERS:
                found.append(Note("mapped", where, f"{key}={number(settings.get(key, group[key]))!r:.60}"))
            else:
                found.append(Note("dropped", where, "hbcore has no such entry, or always this value"))
    slots = {(name, form.renamed(entry).get(name, name)) for entry in state.values() for name in entry if name != "step"}
    for name, ours in sorted(slots, key=str):
        what = repr(ours) if ours else form.becomes.get(name)
        where = f"state[...][{name!r}]"
        found.append(Note("mapped", where, what) if what else Note("dropped", where, "hbcore has no such slot"))
    return [*found, *(Note("assumed", form.name, text) for text in form.assumed)]


def shape_of(entry: Any) -> Shape:
    """The shape of the parameter that a state is of: that of its slots, which may have a size of 1 where they are sums; None
    without a state."""
    shapes = [tuple(v.shape) for v in (entry or {}).values() if isinstance(v, Tensor)]
    rank = max(map(len, shapes), default=0)
    return tuple(map(max, zip(*(s for s in shapes if len(s) == rank), strict=True))) if shapes else None


def is_wide(entry: Any) -> bool:
    return any(isinstance(v, Tensor) and v.dtype == torch.float64 and v.ndim for v in (entry or {}).values())
