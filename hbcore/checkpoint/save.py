"""Save a complete state dict: every trained parameter with every slot, stepped or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from hbcore.checkpoint import schema, weights
from hbcore.distributed.exchange import broadcast, owners
from hbcore.distributed.placement import is_dtensor, local, shards_of, share_out, spread_like, spread_part, spread_rows
from hbcore.engine.core import OptimizerCore
from hbcore.engine.entry_forms import fixed
from hbcore.engine.param_codec import settle
from hbcore.state.expected import Logical
from hbcore.state.slots import compact

PLAIN = (bool, int, float, str, type(None), Tensor)
"""Types that a group entry may contain and still load with ``weights_only=True``."""


MODE = "train_mode"
"""The group entry of optimizers with two sets of weights that says which one the parameters hold, as schedulefree has it."""


def record_of(core: OptimizerCore, g: int, live: bool = False, own: Iterable[str] = ()) -> schema.Record:
    """The record of one group: for a checkpoint, or ``live``, for the group itself, with the options of the optimizer.

    ``own`` are the names of the state that no rule uses.

    A checkpoint has no options: it is the same whatever backend wrote it, and a load leaves them alone. A live record has no
    list of frozen parameters, because schedulers and ``zero_grad`` read the groups after every step.
    """
    settings, params = core.settings, [] if live else core.groups[g]["params"]
    return schema.Record(
        core.chain.versions(core.groups[g]),
        settings.codec.name,
        settings.seed,
        dict(core.carried(g)),
        core.modes.training,
        {core.name: core.options} if live and core.options else {},
        tuple(i for i, p in enumerate(params) if not (p.requires_grad or core.state.get(p))),
        tuple(sorted(own)),
        settings.param_codec.name if settings.param_codec is not None else "",
    )


def refresh_records(core: OptimizerCore) -> None:
    """Bring the strings in the groups up to date, for those who save groups on their own."""
    settled = core.skipping.settle(wait=False)  # schedulers read the groups after every step, and should not wait for it
    if core.recorded == core.modes.training:
        return
    around: dict[Any, tuple[str, str]] = {}
    for g, group in enumerate(core.groups):
        if schema.KEY in group:
            key = core.chain.structure(group)  # schedulers read the groups after every step: most are alike but for numbers
            if key is None or key not in around:
                around[key] = record_of(core, g, live=True).around()
            before, after = around[key]
            group[schema.KEY] = before + schema.encoded(core.carried(g)) + after
        if MODE in group:
            group[MODE] = core.modes.training
    core.recorded = core.modes.training if settled else None


def with_hooks(optimizer: torch.optim.Optimizer, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call ``make`` with torch's state dict hooks around it."""
    for pre in optimizer._optimizer_state_dict_pre_hooks.values():
        pre(optimizer)
    result = make()
    for post in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post(optimizer, result)
        result = result if replaced is None else replaced
    return result


def state_dict(core: OptimizerCore) -> dict[str, Any]:
    """See :meth:`hbcore.optimizer.Optimizer.state_dict`."""
    refresh_records(core)
    settle(core, final=False)
    groups: list[dict[str, Any]] = []
    state: dict[Any, dict[str, Any]] = {}
    owned = owners(p for group in core.groups for p in group["params"])
    for g, group in enumerate(core.groups):
        start = sum(len(done["params"]) for done in groups)
        packed = {k: plain(fixed(v) if k in core.chain.keys else v) for k, v in group.items() if k != "params"}
        packed = {k: v for k, v in packed.items() if _is_plain(v)}
        own: set[str] = set()
        for i, p in enumerate(group["params"], start=start):
            entry = whole_entry(core, group, p, owned)
            entry.update(weights.sum_of(core, p, entry))
            more = {k: v for k, v in core.state.get(p, {}).items() if k not in entry}
            own |= {name for name in more if isinstance(name, str)}
            if entry := {**entry, **more, **_kept(core, p)}:
                state[i] = entry
        packed[schema.KEY] = record_of(core, g, own=own).dump()
        groups.append({**packed, "params": list(range(start, start + len(group["params"])))})
    users = {key: value for key, value in core.state.own().items() if not isinstance(key, int)}  # numbers are parameters there
    return {"state": {**state, **users}, "param_groups": groups}


def whole_entry(core: OptimizerCore, group: dict[str, Any], p: Tensor, owned: Mapping[Tensor, int]) -> dict[str, Any]:
    """One parameter's slots, with initial values for missing ones; empty for a parameter that is not trained."""
    held: Mapping[str, Any] = core.state.get(p, {})
    if not held and not p.requires_grad:
        return {}
    entry: dict[str, Any] = {"step": compact(held.get("step", torch.zeros((), dtype=torch.float32, device="cpu")))}
    for slot in core.chain.expected(group, p):
        parts = slot.parts(p)
        if slot.matrix:
            entry.update(_matrix_slot(slot, p, held, owned))
        elif slot.scalar:
            blank = slot.blank(local(p))
            entry.update({name: compact(held.get(name, blank[name])) for name in parts})
        elif slot.flat:
            entry.update(_flat_slot(slot, p, held))
        elif all(name in held for name in parts):
            entry.update({name: held[name] for name in parts})
        else:
            entry.update({name: spread_part(t, p) for name, t in blank_local(slot, p).items()})
    return entry


def _flat_slot(slot: Logical, p: Tensor, held: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's part of a flat rule's slot, in memory of its own, sharded like the parameter."""
    part, rest = local(p.detach()), slot.shape[p.ndim :]
    blank = slot._replace(shape=torch.Size((*part.shape, *rest))).blank(part)
    return {name: spread_rows(compact(local(held[name])) if name in held else t, p, rest) for name, t in blank.items()}


def _kept(core: OptimizerCore, p: Tensor) -> dict[str, Tensor]:
    """The weights to train with, if the parameter holds those to evaluate with."""
    if core.modes.training:
        return {}
    return {schema.KEPT + name: spread_like(t, p) for name, t in core.modes.kept.get(p, {}).items()}


def _matrix_slot(slot: Logical, p: Tensor, held: Mapping[str, Any], owned: Mapping[Tensor, int]) -> dict[str, Tensor]:
    """A matrix rule's full slot; sharded by rows if the parameter is sharded, so that all ranks have the same entries."""
    shards = shards_of(p)
    parts = slot.parts(p)
    if all(name in held and (shards is None or is_dtensor(held[name])) for name in parts):
        return {name: compact(held[name]) for name in parts}
    whole = slot.blank(local(p))
    if shards is None:
        return whole
    for name, tensor in whole.items():
        if name in held:
            tensor.copy_(held[name])
        if "step" in held:  # after a step, only the parameter's owner has the rule's state
            broadcast(tensor, owned[p], shards)
    return {name: share_out(tensor, shards) for name, tensor in whole.items()}


def blank_local(slot: Logical, p: Tensor) -> dict[str, Tensor]:
    """The initial elementwise slot for this rank's shard of ``p``, in its memory order."""
    part = local(p.detach())
    values = slot._replace(shape=part.shape).blank(part)
    return {
        name: torch.empty_like(part, dtype=t.dtype, requires_grad=False).copy_(t) if t.shape == part.shape else t
        for name, t in values.items()
    }


def plain(value: Any) -> Any:
    """A group's entry with NumPy's numbers as Python's, in tuples and lists too."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(plain, value)) if type(value) in (tuple, list) else tuple(map(plain, value))
    if isinstance(value, bool) or type(value) in (int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, PLAIN)
