"""Load a state dict exactly, or not at all.

``torch.optim.Optimizer.load_state_dict`` casts every state tensor to the parameter's dtype (pytorch issue 43706) and matches
by position. This one validates everything first, keeps every value as saved, and matches by name where possible.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hbcore.checkpoint import foreign, save, schema, wellformed
from hbcore.checkpoint.counterpart import counterpart_of, received
from hbcore.checkpoint.entries import Reader
from hbcore.distributed.placement import is_dtensor, local
from hbcore.engine.core import OptimizerCore
from hbcore.engine.corrections import Loaded
from hbcore.engine.entry_forms import fixed
from hbcore.engine.offload import sent_home
from hbcore.engine.param_codec import note, settle
from hbcore.errors import CheckpointError, HyperparameterError, StateWarning
from hbcore.warn import warn_at_caller


class Receiver(Protocol):
    """An optimizer as it is loaded into: :class:`hbcore.Optimizer`."""

    @property
    def core(self) -> OptimizerCore:
        """Its part in the engine."""


class Content(NamedTuple):
    """Validated checkpoint content for an optimizer: group entries, records, each parameter's state, and the user's own.

    ``corrections`` are those of ``param_ecc`` that have yet to find their weights.
    """

    groups: list[dict[str, Any]]
    records: list[schema.Record | None]
    state: dict[Tensor, dict[str, Any]]
    own: dict[Any, Any]
    corrections: dict[Tensor, Loaded]


@contextmanager
def hooks(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Run torch's load hooks around a block, which receives the state dict returned by the pre-hooks.

    Raises:
        CheckpointError: ``state_dict`` is no dict.
    """
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"a state dict is a dict with 'state' and 'param_groups'; got a {type(state_dict).__name__}.")
    state_dict = dict(state_dict)
    for pre in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre(optimizer, state_dict)
        state_dict = state_dict if replaced is None else dict(replaced)
    yield state_dict
    for post in optimizer._optimizer_load_state_dict_post_hooks.values():
        post(optimizer)


def adopt(core: OptimizerCore) -> None:
    """Take what groups carry from the strings that somebody wrote into them, along with state: wrappers of optimizers, such as
    ZeroRedundancyOptimizer, load so.

    Does nothing unless the state was written to since the last step, and the strings were up to date before.

    Raises:
        CheckpointError: a string is malformed.
    """
    if core.recorded is None or core.state.revision.count == core.seen:
        return
    for g, group in enumerate(core.groups):
        record = schema.read(group.get(schema.KEY), g)
        if record is not None and dict(record.progress) != dict(core.carried(g)):
            scalars = core.scalars_of(g)
            scalars.clear()
            scalars.update(record.progress)


def put(core: OptimizerCore, content: Content) -> None:
    """Install the result of :func:`read`. Raises nothing."""
    for group, values in zip(core.groups, content.groups, strict=True):
        group.update(values)
    core.modes.reset(all(record.training for record in content.records if record))
    for p, entry in content.state.items():
        if kept := {name: entry.pop(name) for name in list(entry) if str(name).startswith(schema.KEPT)}:
            core.modes.kept[p] = {name.removeprefix(schema.KEPT): t for name, t in kept.items()}
    core.recorded = None
    core.skipping.settle()
    core.group_scalars[:] = [dict(record.progress) if record else {} for record in content.records]
    _place(core, content.state if core.state else _begun(content.state))
    for key in core.state.own():
        del core.state[key]
    core.state.update(content.own)
    core.corrections.await_weights(content.corrections)
    note(core)
    settle(core, final=False)


def _begun(state: dict[Tensor, dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
    """Without what has not begun, which is the same as absent: all zero, its step too (ADR 0009).

    Accelerate has an optimizer load what it has just saved, and may replace its parameters by shards before the first step;
    state of the whole ones would stay for good.
    """
    return {
        p: entry
        for p, entry in state.items()
        if any(not isinstance(value, Tensor) or bool(local(value).any()) for value in entry.values())
    }


def _place(core: OptimizerCore, state: dict[Tensor, dict[str, Any]]) -> None:
    """Copy loaded state into the existing tensors, so that captured graphs stay valid; replace those if they do not match."""
    fits = core.plan is not None and set(state) == set(core.state) - set(core.state.own()) and not _decides(core)
    fits = fits and all(_alike(core.state[p], entry) for p, entry in state.items())
    if not fits:
        core.state.clear()
        core.state.update(state)
        core.invalidate()
        return
    for p, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                local(core.state[p][name]).copy_(local(value))
    assert core.plan is not None
    core.plan.reread()


def _decides(core: OptimizerCore) -> bool:
    """Whether loaded state decides what a step does: whether a rule has yet to prime, and what a flat rule's vector is."""
    return any(t.primes or t.flat for group in core.groups for t in core.chain.every(group))


def _alike(held: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return set(held) == set(entry) and all(
        isinstance(v, Tensor)
        and isinstance(held[k], Tensor)
        and (v.shape, v.dtype, is_dtensor(v)) == (held[k].shape, held[k].dtype, is_dtensor(held[k]))
        for k, v in entry.items()
    )


def read(optimizer: Receiver, state_dict: Mapping[str, Any], strict: bool, composite: bool = False) -> Content:
    """Validate a state dict and return what each group and parameter will hold. Mutates nothing.

    Groups from torch.optim are read as the counterpart's. Within a ``composite``, state that no rule used when it was
    saved is the composite's, and is given back.

    Raises:
        CheckpointError: the state dict does not fit the optimizer.
    """
    core = optimizer.core
    name = core.name
    if foreign.is_heavyball(state_dict):
        raise CheckpointError(f"{name}: {foreign.remedy(name)}.")
    wellformed.check(name, state_dict, len(core.groups))
    state_dict = received(core, counterpart_of(type(optimizer)), state_dict)
    saved = state_dict["param_groups"]
    known = {key for theirs in saved for key in theirs["params"]}
    settle(core, final=False)
    groups, records, state = [], [], {}
    corrections: dict[Tensor, Loaded] = {}
    for g, (theirs, ours) in enumerate(zip(saved, core.groups, strict=True)):
        records.append(schema.read(theirs.get(schema.KEY), g))
        frozen = _frozen(name, records[-1], theirs, g)
        groups.append(_numbers(core, theirs, ours, g))
        reader = Reader(core, g, records[-1], theirs, strict, composite)
        for i, key in enumerate(_match(core, theirs, ours, g, strict)):
            entry = None if key is None else state_dict["state"].get(key)
            loaded = {} if entry is None and key in frozen else reader.read(i, entry)
            corrections.update(reader.corrections)
            if loaded:
                p = ours["params"][i]
                state[p] = sent_home(core.settings.offload, p, loaded)
    own = {k: v for k, v in state_dict["state"].items() if not isinstance(k, int) and k not in known}
    if strict and (strangers := [k for k in state_dict["state"] if k not in known and k not in own]):
        raise CheckpointError(f"{name}: the checkpoint has state for {strangers[:5]}, which is in none of its param groups.")
    return Content(groups, records, state, copy.deepcopy(own), corrections)


def _frozen(name: str, record: schema.Record | None, theirs: Mapping[str, Any], g: int) -> list[Any]:
    """The keys of the parameters that were not trained when the checkpoint was saved."""
    keys, frozen = theirs["params"], () if record is None else record.frozen
    if any(not 0 <= i < len(keys) for i in frozen):
        raise CheckpointError(
            f"{name}: param group {g} of the checkpoint has {len(keys)} parameters, and its {schema.KEY!r} entry has "
            f"{list(frozen)[:5]} as 'frozen'."
        )
    return [keys[i] for i in frozen]


def _match(core: OptimizerCore, theirs: Mapping[str, Any], ours: Mapping[str, Any], g: int, strict: bool) -> list[Any]:
    """For each of our parameters, its state's key in the checkpoint; None if it has none."""
    keys, names, wanted = list(theirs["params"]), list(theirs.get("param_names") or ()), list(ours.get("param_names") or ())
    by_name = dict(zip(names, keys, strict=True)) if names and wanted and names != wanted else None
    if by_name is not None and len(by_name) != len(keys):
        twice = next(n for n in names if names.count(n) > 1)
        raise CheckpointError(f"{core.name}: param group {g} of the checkpoint has several parameters named {twice!r}.")
    if (by_name is None or strict) and len(keys) != len(ours["params"]):
        raise CheckpointError(
            f"{core.name}: param group {g} has {len(keys)} parameters in the checkpoint and "
            f"{len(ours['params'])} here; load it into the model it was saved from"
            + (", or by name, with strict=False." if by_name else ".")
        )
    if by_name is None:
        return keys
    missing = [n for n in wanted if n not in by_name]
    if missing and strict:
        raise CheckpointError(
            f"{core.name}: param group {g} of the checkpoint has no {', '.join(map(repr, missing[:5]))}; "
            f"it has {', '.join(map(repr, list(by_name)[:5]))}, ... Pass strict=False to start those from scratch."
        )
    return [by_name.get(n) for n in wanted]


def _numbers(core: OptimizerCore, theirs: Mapping[str, Any], ours: dict[str, Any], g: int) -> dict[str, Any]:
    """The group entries taken from the checkpoint: numbers, and entries added by schedulers or users."""
    keep = {"params", schema.KEY, save.MODE}
    if "param_names" in ours or len(theirs.get("param_names") or ()) != len(ours["params"]):
        keep.add("param_names")  # an optimizer without names takes the checkpoint's, as in torch
    structural = {k for k in core.chain.keys if k not in core.chain.dynamic(ours)}
    values = {k: copy.deepcopy(v) for k, v in theirs.items() if k not in keep and k not in structural}
    if schema.KEY in theirs and (missing := [k for k in core.chain.dynamic(ours) if k not in theirs]):
        warn_at_caller(
            f"param group {g} of the checkpoint has no {', '.join(map(repr, missing))}; this optimizer's own apply.",
            StateWarning,
        )
    for key in (key for key in core.chain.keys if isinstance(ours[key], tuple) and values.get(key) is not None):
        if not isinstance(fixed(values[key]), tuple):  # the class's ``chain`` may take it apart
            raise CheckpointError(
                f"{core.name}, parameter group {g}: {key}={values[key]!r:.60} is not {len(ours[key])} numbers there."
            )
    try:
        core.chain.check({**ours, **values}, f"{core.name}, parameter group {g}")
    except HyperparameterError as error:
        raise CheckpointError(f"the checkpoint's numbers do not fit: {error}") from None
    except Exception as error:  # of the class's own ``chain``, which was given them
        raise CheckpointError(
            f"the checkpoint's numbers do not fit: {core.name}, parameter group {g}: {type(error).__name__}: {error}"
        ) from error
    return values
