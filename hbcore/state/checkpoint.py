"""Loading a state dict exactly, or not at all.

``torch.optim.Optimizer.load_state_dict`` casts every state tensor to the parameter's dtype (pytorch issue 43706) and matches
by position. This one validates everything first, then keeps every dtype as it was saved, and matches by name where it can.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hbcore.errors import CheckpointError, HyperparameterError, StateWarning
from hbcore.rules import route
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Transform
from hbcore.state import schema

if TYPE_CHECKING:
    from hbcore.engine.optimizer import Optimizer


def metadata(transforms: Iterable[Transform], codec: str) -> str:
    """The ``hbcore`` entry of a group that runs ``transforms`` and stores its slots with ``codec``."""
    return schema.dump(versions(transforms), codec)


def versions(transforms: Iterable[Transform]) -> dict[str, int]:
    """The chain's transforms by name, with their versions."""
    return {t.name: t.version for t in route.every(transforms)}


def load(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """See :meth:`hbcore.engine.optimizer.Optimizer.load_state_dict`."""
    state_dict = dict(state_dict)
    for pre in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre(optimizer, state_dict)
        state_dict = state_dict if replaced is None else dict(replaced)
    groups, state = _validated(optimizer, state_dict)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)
    optimizer.state.clear()
    optimizer.state.update(state)
    optimizer._plan = None
    for post in optimizer._optimizer_load_state_dict_post_hooks.values():
        post(optimizer)


def _validated(
    optimizer: Optimizer, state_dict: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
    """What each group and each parameter will hold. Mutates nothing."""
    name = type(optimizer).__name__
    if not isinstance(state_dict.get("state"), Mapping) or not isinstance(state_dict.get("param_groups"), (list, tuple)):
        raise CheckpointError(f"{name}: a state dict has 'state' and 'param_groups'; got {sorted(map(str, state_dict))}.")
    saved = state_dict["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{name}: the checkpoint has {len(saved)} param groups, the optimizer {len(optimizer.param_groups)}; "
            "build the optimizer with the same groups."
        )
    for g, theirs in enumerate(saved):
        if not isinstance(theirs, Mapping) or not isinstance(theirs.get("params"), (list, tuple)):
            raise CheckpointError(f"{name}: param group {g} of the checkpoint has no list of 'params'.")
    known = {key for theirs in saved for key in theirs["params"]}
    groups, state = [], {}
    for g, (theirs, ours) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        schema.check(theirs.get(schema.KEY), versions(optimizer._transforms(ours)), g)
        groups.append(_numbers(optimizer, theirs, ours, g))
        for i, key in enumerate(_match(optimizer, theirs, ours, g)):
            param = ours["params"][i]
            entry = state_dict["state"].get(key)
            if entry:
                state[param] = _entry(optimizer, theirs, g, i, entry)
    if strangers := [k for k in state_dict["state"] if k not in known]:
        raise CheckpointError(f"{name}: the checkpoint has state for {strangers[:5]}, which none of its param groups lists.")
    return groups, state


def _entry(optimizer: Optimizer, theirs: Mapping[str, Any], g: int, i: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state, every slot of the rules that the checkpoint knows in place."""
    group = optimizer.param_groups[g]
    codec, dtype = optimizer.settings.codec, compute_dtype(group["params"][i].dtype)
    entry = {k: v for k, v in entry.items() if v is not None}  # torch.optim.SGD's momentum before its first step
    saved = schema.rules(theirs.get(schema.KEY))
    parts: dict[str, torch.dtype] = {}
    for t in optimizer._chain_of(group, group["params"][i]):
        own: dict[str, torch.dtype] = {}
        for slot in t.slots(group["params"][i]):
            own.update(codec.parts(slot, dtype))
        absent = [k for k in own if k not in entry]
        if absent and (t.name in saved or len(absent) < len(own)):
            raise CheckpointError(f"{optimizer._name_of(g, i)} has no {absent[0]!r} in the checkpoint, which {t.name!r} needs.")
        parts.update(own)
    loaded = {k: _loaded(optimizer, g, i, k, v) for k, v in entry.items()}
    if any(k in loaded for k in parts):
        loaded.setdefault(
            "step", torch.ones((), dtype=torch.float32, device="cpu")
        )  # torch.optim.SGD does not count; it has begun
    for k, wanted in parts.items():
        if k in loaded and loaded[k].dtype != wanted:
            warnings.warn(
                f"state {k!r} was saved as {loaded[k].dtype} and is converted to {wanted}, which storage_dtype asks for.",
                StateWarning,
                stacklevel=5,
            )
            loaded[k] = loaded[k].to(wanted)
    return loaded


def _match(optimizer: Optimizer, theirs: Mapping[str, Any], ours: Mapping[str, Any], g: int) -> list[Any]:
    """For each of our parameters, the key of its state in the checkpoint."""
    keys, names, wanted = list(theirs["params"]), theirs.get("param_names"), ours.get("param_names")
    if len(keys) != len(ours["params"]):
        raise CheckpointError(
            f"{type(optimizer).__name__}: param group {g} has {len(keys)} parameters in the checkpoint and "
            f"{len(ours['params'])} here; load it into the model it was saved from."
        )
    if not names or not wanted:
        return keys
    by_name = dict(zip(names, keys, strict=True))
    missing = [n for n in wanted if n not in by_name]
    if missing:
        raise CheckpointError(
            f"{type(optimizer).__name__}: param group {g} of the checkpoint has no {', '.join(map(repr, missing[:5]))}; "
            f"it has {', '.join(map(repr, list(by_name)[:5]))}, ..."
        )
    return [by_name[n] for n in wanted]


def _numbers(optimizer: Optimizer, theirs: Mapping[str, Any], ours: dict[str, Any], g: int) -> dict[str, Any]:
    """The group entries that the checkpoint decides: numbers, and whatever schedulers or users put there."""
    keep = {"params", "param_names", schema.KEY}
    structural = {k for k in optimizer._keys if k not in optimizer._dynamic(ours)}
    values = {k: copy.deepcopy(v) for k, v in theirs.items() if k not in keep and k not in structural}
    try:
        optimizer._check_hyperparameters({**ours, **values}, g)
    except HyperparameterError as error:
        raise CheckpointError(f"the checkpoint's numbers do not fit: {error}") from None
    return values


def _loaded(optimizer: Optimizer, g: int, i: int, key: Any, value: Any) -> Any:
    """One state entry as it will be held: the dtype it was saved with, on the parameter's device, in its memory order."""
    param = optimizer.param_groups[g]["params"][i]
    if not isinstance(value, Tensor):
        if key in {s for t in optimizer._chain_of(optimizer.param_groups[g], param) for s in t.slots(param)}:
            raise CheckpointError(
                f"{optimizer._name_of(g, i)} has {value!r} for state {key!r} in the checkpoint; it is a tensor."
            )
        if key == "step" and isinstance(value, (int, float)):
            return torch.tensor(float(value), dtype=torch.float32)
        return copy.deepcopy(value)
    if key == "step":
        return value.detach().clone().to("cpu", torch.float32)
    if value.shape != param.shape:
        raise CheckpointError(
            f"{optimizer._name_of(g, i)} has state {key!r} of shape {tuple(value.shape)} in the checkpoint; "
            "load it into the model it was saved from."
        )
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
