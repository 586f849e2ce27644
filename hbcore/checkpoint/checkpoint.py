"""Saving a state dict that is whole, and loading one exactly or not at all.

``torch.optim.Optimizer.load_state_dict`` casts every state tensor to the parameter's dtype (pytorch issue 43706) and matches
by position. This one validates everything first, then keeps every value as it was saved, and matches by name where it can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hbcore.checkpoint import schema
from hbcore.checkpoint.entries import Reader
from hbcore.distributed.exchange import broadcast, owners, total
from hbcore.distributed.placement import is_dtensor, local, shards_of, share_out, spread_like
from hbcore.errors import CheckpointError, HyperparameterError
from hbcore.state.expected import Logical
from hbcore.state.slots import own

if TYPE_CHECKING:
    from hbcore.optimizer import Optimizer

PLAIN = (bool, int, float, str, type(None), Tensor)
"""What a group's entry may be made of and still load with ``weights_only=True``."""


def record_of(optimizer: Optimizer, g: int) -> schema.Record:
    """What a checkpoint says of one group."""
    settings = optimizer.settings
    progress = optimizer._progress[g] if g < len(optimizer._progress) else {}
    return schema.Record(
        optimizer.structure.versions(optimizer.param_groups[g]),
        settings.codec.name,
        settings.seed,
        dict(progress),
        optimizer.modes.training,
    )


# --- saving -----------------------------------------------------------------------------------------------------------


def save(optimizer: Optimizer) -> dict[str, Any]:
    """See :meth:`hbcore.optimizer.Optimizer.state_dict`."""
    return with_save_hooks(optimizer, lambda: _saved(optimizer))


def with_save_hooks(optimizer: torch.optim.Optimizer, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The state dict that ``make`` returns, with torch's hooks around."""
    for pre in optimizer._optimizer_state_dict_pre_hooks.values():
        pre(optimizer)
    result = make()
    for post in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post(optimizer, result)
        result = result if replaced is None else replaced
    return result


def _saved(optimizer: Optimizer) -> dict[str, Any]:
    groups: list[dict[str, Any]] = []
    state: dict[Any, dict[str, Any]] = {}
    owned = owners(p for group in optimizer.param_groups for p in group["params"])
    for g, group in enumerate(optimizer.param_groups):
        start = sum(len(done["params"]) for done in groups)
        packed = {k: _number(v) for k, v in group.items() if k != "params"}
        packed = {k: v for k, v in packed.items() if _is_plain(v)}
        packed[schema.KEY] = record_of(optimizer, g).dump()
        groups.append({**packed, "params": list(range(start, start + len(group["params"])))})
        for i, p in enumerate(group["params"], start=start):
            entry = whole_entry(optimizer, group, p, owned)
            if entry:
                state[i] = entry
    return {"state": state, "param_groups": groups}


def whole_entry(optimizer: Optimizer, group: dict[str, Any], p: Tensor, owned: Mapping[Tensor, int]) -> dict[str, Any]:
    """One parameter's state, zeros for what it does not have yet; nothing for a parameter that is not trained."""
    held: Mapping[str, Any] = optimizer.state.get(p, {})
    if not held and not p.requires_grad:
        return {}
    entry: dict[str, Any] = {"step": own(held.get("step", torch.zeros((), dtype=torch.float32, device="cpu")))}
    for slot in optimizer.structure.expected(group, p):
        parts = slot.parts(p)
        if slot.matrix:
            entry.update(_matrix_slot(slot, p, held, owned))
        elif all(name in held for name in parts):
            entry.update({name: held[name] for name in parts})
        else:
            entry.update({name: spread_like(t, p) for name, t in blank_local(slot, p).items()})
    entry.update({k: v for k, v in held.items() if k not in entry})
    return entry


def _matrix_slot(slot: Logical, p: Tensor, held: Mapping[str, Any], owned: Mapping[Tensor, int]) -> dict[str, Tensor]:
    """A matrix rule's slot, whole; of a spread parameter sharded along its rows, so that every rank has the same entries."""
    shards = shards_of(p)
    parts = slot.parts(p)
    if all(name in held and (shards is None or is_dtensor(held[name])) for name in parts):
        return {name: own(held[name]) for name in parts}
    whole = slot.blank(local(p))
    if shards is None:
        return whole
    for name, tensor in whole.items():
        if name in held:
            tensor.copy_(held[name])
        if "step" in held:  # this parameter was stepped, and its owner alone has what the rule remembers
            broadcast(tensor, owned[p], shards)
    return {name: share_out(tensor, shards) for name, tensor in whole.items()}


def blank_local(slot: Logical, p: Tensor) -> dict[str, Tensor]:
    """An elementwise slot of this rank's part of ``p`` before the first step, in its memory order."""
    part = local(p.detach())
    values = slot._replace(shape=part.shape).blank(part)
    return {name: torch.empty_like(part, dtype=t.dtype, requires_grad=False).copy_(t) for name, t in values.items()}


def _number(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    return float(value) if isinstance(value, Real) and not isinstance(value, (bool, int, float)) else value


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, PLAIN)


# --- loading ----------------------------------------------------------------------------------------------------------


class Content(NamedTuple):
    """What a checkpoint holds for an optimizer, looked at and found to fit: group entries, records, each parameter's state."""

    groups: list[dict[str, Any]]
    records: list[schema.Record | None]
    state: dict[Tensor, dict[str, Any]]


def load(optimizer: Optimizer, state_dict: Mapping[str, Any], strict: bool = True) -> None:
    """See :meth:`hbcore.optimizer.Optimizer.load_state_dict`."""
    with load_hooks(optimizer, state_dict) as given:
        put(optimizer, read(optimizer, given, strict))


@contextmanager
def load_hooks(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """torch's hooks around a load: the block gets the state dict that the hooks before it leave."""
    state_dict = dict(state_dict)
    for pre in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre(optimizer, state_dict)
        state_dict = state_dict if replaced is None else dict(replaced)
    yield state_dict
    for post in optimizer._optimizer_load_state_dict_post_hooks.values():
        post(optimizer)


def put(optimizer: Optimizer, content: Content) -> None:
    """Make what :func:`read` found the optimizer's own. Raises nothing."""
    for group, values in zip(optimizer.param_groups, content.groups, strict=True):
        group.update(values)
    optimizer.modes.forget(all(record.training for record in content.records if record))
    optimizer._progress[:] = [dict(record.progress) if record else {} for record in content.records]
    _place(optimizer, content.state)


def _place(optimizer: Optimizer, state: dict[Tensor, dict[str, Any]]) -> None:
    """Put loaded tensors where the old ones were, so that captured graphs find them; elsewhere if they do not fit there."""
    fits = optimizer._plan is not None and set(state) == set(optimizer.state) and not _primes(optimizer)
    fits = fits and all(_alike(optimizer.state[p], entry) for p, entry in state.items())
    if not fits:
        optimizer.state.clear()
        optimizer.state.update(state)
        optimizer._plan = None
        return
    for p, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                local(optimizer.state[p][name]).copy_(local(value))
    assert optimizer._plan is not None
    optimizer._plan.reread()


def _primes(optimizer: Optimizer) -> bool:
    """Whether some rule's first gradient only prepares the state: what was loaded decides whether that is still to come."""
    return any(t.primes for group in optimizer.param_groups for t in optimizer.structure.every(group))


def _alike(held: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return set(held) == set(entry) and all(
        isinstance(v, Tensor)
        and isinstance(held[k], Tensor)
        and (v.shape, v.dtype, is_dtensor(v)) == (held[k].shape, held[k].dtype, is_dtensor(held[k]))
        for k, v in entry.items()
    )


def read(optimizer: Optimizer, state_dict: Mapping[str, Any], strict: bool) -> Content:
    """What each group and each parameter will hold. Mutates nothing.

    Raises:
        CheckpointError: it does not fit.
    """
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
    groups, records, state = [], [], {}
    for g, (theirs, ours) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        records.append(schema.read(theirs.get(schema.KEY), g))
        groups.append(_numbers(optimizer, theirs, ours, g))
        reader = Reader(optimizer, g, records[-1], theirs, strict)
        for i, key in enumerate(_match(optimizer, theirs, ours, g, strict)):
            entry = None if key is None else state_dict["state"].get(key)
            loaded = reader.read(i, entry)
            if loaded:
                state[ours["params"][i]] = loaded
    if strict and (strangers := [k for k in state_dict["state"] if k not in known]):
        raise CheckpointError(f"{name}: the checkpoint has state for {strangers[:5]}, which none of its param groups lists.")
    return Content(groups, records, state)


def _match(optimizer: Optimizer, theirs: Mapping[str, Any], ours: Mapping[str, Any], g: int, strict: bool) -> list[Any]:
    """For each of our parameters, the key of its state in the checkpoint; None for one that it does not know."""
    keys, names, wanted = list(theirs["params"]), theirs.get("param_names"), ours.get("param_names")
    by_name = dict(zip(names, keys, strict=False)) if names and wanted else None
    if (by_name is None or strict) and len(keys) != len(ours["params"]):
        raise CheckpointError(
            f"{type(optimizer).__name__}: param group {g} has {len(keys)} parameters in the checkpoint and "
            f"{len(ours['params'])} here; load it into the model it was saved from"
            + (", or by name, with strict=False." if by_name else ".")
        )
    if by_name is None:
        return keys
    missing = [n for n in wanted or () if n not in by_name]
    if missing and strict:
        raise CheckpointError(
            f"{type(optimizer).__name__}: param group {g} of the checkpoint has no {', '.join(map(repr, missing[:5]))}; "
            f"it has {', '.join(map(repr, list(by_name)[:5]))}, ... Pass strict=False to start those afresh."
        )
    return [by_name.get(n) for n in wanted or ()]


def _numbers(optimizer: Optimizer, theirs: Mapping[str, Any], ours: dict[str, Any], g: int) -> dict[str, Any]:
    """The group entries that the checkpoint decides: numbers, and whatever schedulers or users put there."""
    keep = {"params", "param_names", schema.KEY}
    structural = {k for k in optimizer.structure.keys if k not in optimizer.structure.dynamic(ours)}
    values = {k: copy.deepcopy(v) for k, v in theirs.items() if k not in keep and k not in structural}
    try:
        optimizer.structure.check({**ours, **values}, f"{type(optimizer).__name__}, parameter group {g}")
    except HyperparameterError as error:
        raise CheckpointError(f"the checkpoint's numbers do not fit: {error}") from None
    return values


def is_dry(optimizer: Optimizer) -> bool:
    """Whether this step is the one that torch.distributed.checkpoint takes to make an optimizer allocate its state.

    It has no state yet, every learning rate is 0, and so is every gradient, on all ranks.
    """
    if optimizer.state or any(float(group["lr"]) != 0 for group in optimizer.param_groups):
        return False
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    flags = torch.tensor([bool(grads), any(bool(local(g).any()) for g in grads)], dtype=torch.float32)
    spread = next((p for p in params if is_dtensor(p)), None)
    if spread is not None:  # every rank asks, whatever gradients it has
        flags = flags.to(local(spread).device)
        shards = shards_of(spread)
        assert shards is not None
        total(flags, "amax", shards)
    return bool(flags[0]) and not bool(flags[1])


def allocate(optimizer: Optimizer) -> None:
    """Give every parameter that has a gradient its state of before the first step."""
    owned = owners(p for group in optimizer.param_groups for p in group["params"])
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                optimizer.state[p] = whole_entry(optimizer, group, p, owned)
