"""Builds the optimizer that a checkpoint is converted for, and gives the checkpoint that it would have saved."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hbcore import registry
from hbcore.checkpoint import load, schema
from hbcore.checkpoint.weights import RULE as PARAM_ECC
from hbcore.errors import CheckpointError, HbcoreError, OptionError
from hbcore.migrate import plain, sources
from hbcore.migrate.source import Converted, Description, Note, Source, Target
from hbcore.migrate.weights import Weights
from hbcore.optimizer import Optimizer


class Migrated(NamedTuple):
    """A converted checkpoint.

    Attributes:
        state_dict: hbcore's, for the optimizer's ``load_state_dict``.
        notes: what became of the source's entries.
        source: the name of the library that it comes from.
        optimizer: the canonical name of the optimizer it is for.
        options: the arguments that the optimizer was built with, and should be built with to resume.
    """

    state_dict: dict[str, Any]
    notes: list[Note]
    source: str
    optimizer: str
    options: dict[str, Any]


def convert_checkpoint(state_dict: Mapping[str, Any], optimizer: Optimizer, source: str | None = None) -> dict[str, Any]:
    """Another library's state dict as one that ``optimizer.load_state_dict`` accepts. Changes neither.

    Load the model's weights first: some optimizers' state is relative to them.

    Args:
        state_dict: of an optimizer of HeavyBall 1.7 to 3.2, or of another library that ``hbcore migrate --help`` names.
        optimizer: an hbcore optimizer, with the same parameters in the same groups and order.
        source: the library, if it is not to be recognised: ``"heavyball"``.

    Raises:
        CheckpointError: the state dict is malformed, does not fit the optimizer, or no library's.
    """
    chosen = _source(state_dict, source)
    plain.check(state_dict)
    chosen.describe(state_dict)  # its errors are in the library's terms
    target = Target(optimizer, weights=True)
    converted = chosen.convert(state_dict, target)
    result = recorded(converted, target)
    load.read(optimizer, result, strict=True)
    return result


def migrate(
    state_dict: Mapping[str, Any],
    to: str | None = None,
    source: str | None = None,
    options: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
) -> Migrated:
    """Convert a state dict without the model that it belongs to.

    Args:
        state_dict: of another library's optimizer.
        to: the optimizer to convert it for, any name that :func:`hbcore.get` knows; None for what the state dict tells.
        source: the library; None to recognise it.
        options: the optimizer's arguments; they take precedence over what the state dict tells.
        weights: the model's, if they are known.

    Raises:
        CheckpointError: the state dict is malformed, does not fit, or does not tell enough.
        RegistryError: there is no such optimizer.
        HbcoreError: the optimizer rejects its arguments.
    """
    chosen = _source(state_dict, source)
    plain.check(state_dict)
    described = chosen.describe(state_dict)
    name = to.removeprefix("heavyball.") if to else described.name
    if name is None:
        hint = f"; it may be {' or '.join(described.hint)}" if described.hint else ""
        raise CheckpointError(f"the checkpoint does not tell which optimizer saved it{hint}: name it with --to NAME.")
    cls: Any = registry.resolve(name)
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise CheckpointError(f"{name} is not built on hbcore's engine, and cannot be converted for; convert what it wraps.")
    if described.needs_weights and weights is None:
        raise CheckpointError(f"{described.needs_weights}: pass the model's state dict with --model FILE.")
    given, shared = dict(options or {}), shared_settings(cls, described)
    target = Target(build(cls, described, {**shared, **given}, frozenset(given), weights), weights is not None)
    converted = chosen.convert(state_dict, target)
    result = recorded(converted, target)
    target.optimizer.load_state_dict(result)
    return Migrated(_without_new(target, result), converted.notes, chosen.name, registry.info(name).name, {**shared, **given})


def _source(state_dict: Any, name: str | None) -> Source:
    if isinstance(state_dict, Mapping) and _is_ours(state_dict):
        raise CheckpointError("this is hbcore's own state dict already: load it with load_state_dict.")
    if name is None:
        return sources.recognise(state_dict)
    chosen = sources.named(name)
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"expected an optimizer's state dict; got a {type(state_dict).__name__}.")
    return chosen


def _is_ours(state_dict: Mapping[str, Any]) -> bool:
    groups = state_dict.get("param_groups")
    return isinstance(groups, (list, tuple)) and any(isinstance(g, Mapping) and schema.KEY in g for g in groups)


def shared_settings(cls: type[Optimizer], described: Description) -> dict[str, Any]:
    """The settings in which all groups agree, and that the class has."""
    known = inspect.signature(cls).parameters
    first, *others = described.settings or ({},)
    same = {k: v for k, v in first.items() if k in known and all(k in o and o[k] == v for o in others)}
    return {k: v for k, v in same.items() if v != known[k].default}


def build(
    cls: type[Optimizer], described: Description, options: Mapping[str, Any], given: frozenset[str], weights: Weights | None
) -> Optimizer:
    """An optimizer with the checkpoint's groups, on parameters of zeros, or on the model's ``weights``.

    Parameters of unknown shape are empty and frozen ones: they have no state, and start anew when it is loaded.

    Raises:
        HbcoreError: the class rejects the options.
    """
    defaults = {n: p.default for n, p in inspect.signature(cls).parameters.items()}
    known = {*defaults, *getattr(cls, "group_entries", ())}
    if unknown := sorted(given - known):
        raise OptionError(f"{cls.__name__} has no option {unknown[0]!r}; 'hbcore show {cls.__name__}' lists them.")
    params = parameters(described, weights)
    groups: list[dict[str, Any]] = []
    for g, (mine, settings) in enumerate(zip(params, described.settings, strict=True)):
        own = {
            k: v for k, v in settings.items() if k in known and k not in options and not (k in defaults and v == defaults[k])
        }
        names = weights.names[g] if weights else (described.names[g] if described.names else None)
        groups.append({**own, "params": list(zip(names, mine, strict=True)) if names else mine})
    try:
        made = cls(groups, **options)
    except HbcoreError as error:
        raise type(error)(f"{cls.__name__} does not accept what the checkpoint tells, or --option: {error}") from None
    if [len(group["params"]) for group in made.param_groups] != [len(mine) for mine in params]:
        raise CheckpointError(f"{cls.__name__} arranges parameters with names in groups of its own; leave out --model.")
    return made


def parameters(described: Description, weights: Weights | None) -> list[list[torch.nn.Parameter]]:
    """The parameters of each group."""
    made = []
    for g, shapes in enumerate(described.shapes):
        mine = []
        for i, shape in enumerate(shapes):
            dtype = described.dtypes.get((g, i), torch.float32)
            if weights is not None:
                value = weights.tensors[g][i].detach().clone()
                mine.append(torch.nn.Parameter(value if value.is_floating_point() else value.to(dtype)))
            else:
                mine.append(torch.nn.Parameter(torch.zeros(shape or (0,), dtype=dtype), shape is not None))
        made.append(mine)
    return made


def recorded(converted: Converted, target: Target) -> dict[str, Any]:
    """The conversion as hbcore saves it: with a record in each group, of plain slots."""
    core = target.optimizer.core
    groups = converted.state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in core.groups]:
        raise CheckpointError(
            f"the checkpoint has groups of {[len(g['params']) for g in groups]} parameters, and {core.name} of "
            f"{[len(g['params']) for g in core.groups]}; build it with the same groups, without names if it sorts by them."
        )
    state = {key: dict(entry) for key, entry in converted.state_dict["state"].items() if entry}
    result = []
    for g, group in enumerate(groups):
        entries = [state.get(key) for key in group["params"]]
        there = [(i, entry) for i, entry in enumerate(entries) if entry]
        started = _started(target, g, there)
        rules = {n: v for n, v in core.chain.versions(core.groups[g]).items() if n in started and n != PARAM_ECC}
        progress = converted.progress[g] if converted.progress else {}
        frozen = tuple(i for i, entry in enumerate(entries) if not entry)
        record = schema.Record(rules, "plain", core.settings.seed, dict(progress), converted.training, frozen=frozen)
        own = {k: core.groups[g][k] for k in core.chain.dynamic(core.groups[g])}  # what the source has no counterpart of
        result.append({**own, **group, schema.KEY: record.dump()})
    return {"state": state, "param_groups": result}


def _without_new(target: Target, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """What the target saves, without the rules that the checkpoint had nothing of: zeros at step 1000 are no fresh start."""
    whole = target.optimizer.state_dict()
    for g, (group, theirs) in enumerate(zip(whole["param_groups"], loaded["param_groups"], strict=True)):
        record, before = schema.read(group[schema.KEY], g), schema.read(theirs[schema.KEY], g)
        assert record is not None
        assert before is not None
        new = set(record.rules) - set(before.rules) - {PARAM_ECC}
        for i, key in enumerate(group["params"]):
            gone = {name for s in _slots(target, g, i) if s.rule in new for name in s.parts(target.param(g, i))}
            if key in whole["state"]:
                whole["state"][key] = {k: v for k, v in whole["state"][key].items() if k not in gone}
        group[schema.KEY] = replace(record, rules={n: v for n, v in record.rules.items() if n not in new}).dump()
    return whole


def _started(target: Target, g: int, there: Sequence[tuple[int, Mapping[str, Any]]]) -> set[str]:
    """The rules of a group that are not new to the checkpoint: those without slots, or with any of them."""
    core = target.optimizer.core
    rules = set(core.chain.versions(core.groups[g]))
    held = {s.rule for i, entry in there for s in _slots(target, g, i) if s.name in entry}
    wanted = {s.rule for i, _ in there for s in _slots(target, g, i)}
    return rules - (wanted - held)


def _slots(target: Target, g: int, i: int) -> list[Any]:
    core = target.optimizer.core
    return [s for s in core.chain.expected(core.groups[g], target.param(g, i)) if s.rule != PARAM_ECC]
