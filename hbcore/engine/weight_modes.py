"""Two sets of weights: those to train with and those to evaluate with, of which the parameters hold one; and averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hbcore.distributed.placement import local
from hbcore.engine.chain_spec import seen
from hbcore.engine.core import OptimizerCore
from hbcore.engine.param_codec import beside, note, settle
from hbcore.errors import OptionError, RuleError
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.stages import ParameterEMA
from hbcore.rules.transform import Transform
from hbcore.state.codec import StateCodec, narrowed
from hbcore.state.codec_choice import codec_of, fitting
from hbcore.state.expected import by_rows


def check(core: OptimizerCore) -> None:
    """Look whether the parameters hold the weights to train with.

    Raises:
        RuleError: they hold others.
    """
    if not core.modes.training:
        raise RuleError(f"{core.name}.step() with the weights to evaluate with; call optimizer.train() first.")
    if core.modes.averaging:
        raise RuleError(f"{core.name}.step() within ema_weights(); step outside.")


def switch(core: OptimizerCore, training: bool) -> None:
    """Put the weights to train with into the parameters, or those to evaluate with; does nothing if they are there already.

    Switching back restores the weights bit for bit, unless the parameters were changed in between.
    """
    modes = core.modes
    if modes.averaging:
        raise RuleError("train() and eval() within ema_weights() would mix two sets of weights; call them outside.")
    if training == modes.training:
        return
    core.skipping.settle()
    settle(core)
    kept: dict[Tensor, dict[str, Tensor]] = {}
    for p, chain in _with_two_sets(core):
        now = _weights(core, p)
        kept[p] = {name: t.clone() for name, t in now.items()}
        for t in chain:
            _write(_tensors(core, p), _kept(core, p, t, training, now) or _other(core, p, t, now, training))
    modes.training, modes.kept = training, kept
    note(core)


@contextmanager
def averaged(core: OptimizerCore) -> Iterator[None]:
    """Put the moving averages of ``use_ema=True`` into the parameters, and the parameters' own values back afterwards.

    Raises:
        OptionError: the optimizer keeps none.
    """
    if not core.settings.use_ema:
        raise OptionError(f"{core.name} keeps no average of the parameters; pass use_ema=True.")
    if core.modes.averaging:
        raise RuleError("the parameters hold their averages already; leave ema_weights() first.")
    core.skipping.settle()
    settle(core)
    before: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for group in core.groups:
            for p in group["params"]:
                state: Mapping[str, Any] = core.state.get(p, {})
                if "param_ema" in state and float(state.get("step", 0)) > 0:
                    [ema] = [t for t in core.chain.bound(group, p) if isinstance(t, ParameterEMA)]
                    own, tensors = _weights(core, p), _readable(core, p)
                    slot = ema.slots(seen(p))["param_ema"]
                    value = codec_of("param_ema", slot, core.settings.codec).read(tensors, "param_ema", compute_dtype(p.dtype))
                    average = ema.average({"param_ema": value}, state["step"].double().cpu())
                    before += [(t, t.clone()) for t in own.values()]
                    _write(own, _stored(core, own, average))
    core.modes.averaging = True
    note(core)
    try:
        yield
    finally:
        core.modes.averaging = False
        for part, kept in before:
            part.copy_(kept)
        note(core)


def has_modes(t: Transform) -> bool:
    """Whether a rule has two sets of weights."""
    return type(t).swap is not Transform.swap


def _with_two_sets(core: OptimizerCore) -> Iterator[tuple[Tensor, list[Transform]]]:
    """The parameters that have the state of rules with two sets of weights, and those rules."""
    for group in core.groups:
        for p in group["params"]:
            state: Mapping[str, Any] = core.state.get(p, {})
            chain = [t for t in core.chain.bound(group, p) if has_modes(t) and state.keys() >= t.slots(p).keys()]
            if chain:
                yield p, chain


def _kept(core: OptimizerCore, p: Tensor, t: Transform, training: bool, now: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights from before the last switch, if the present ones were made of exactly those."""
    old = core.modes.kept.get(p)
    if old is None:
        return None
    made = _other(core, p, t, old, not training)
    return old if made.keys() == now.keys() and all(torch.equal(made[name], now[name]) for name in now) else None


def _weights(core: OptimizerCore, p: Tensor) -> dict[str, Tensor]:
    """This rank's part of a parameter, and what ``param_ecc`` keeps beside it."""
    return {"param": local(p.detach()), **beside(core.state[p])}


def _tensors(core: OptimizerCore, p: Tensor) -> dict[str, Tensor]:
    """Everything that a swap may write of a parameter, this rank's parts."""
    stored = {name: local(value) for name, value in core.state[p].items() if isinstance(value, Tensor)}
    return {**stored, "param": local(p.detach())}


def _readable(core: OptimizerCore, p: Tensor) -> dict[str, Tensor]:
    """The same to be read, on the parameter's device: offloaded state is copied there."""
    tensors = _tensors(core, p)
    return {name: t.to(tensors["param"].device) for name, t in tensors.items()}


def _write(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        targets[name].copy_(value)


def _other(core: OptimizerCore, p: Tensor, t: Transform, weights: Mapping[str, Tensor], training: bool) -> dict[str, Tensor]:
    """What ``t.swap`` makes of ``weights``, and of the rule's slots if they change, as stored. Writes nothing."""
    codec, dtype = fitting(core.settings.codec, p.shape, by_rows(p)), compute_dtype(p.dtype)
    packed = _codec(core, weights)
    tensors = {**_readable(core, p), **weights}
    slots = t.slots(seen(p))
    values = {name: codec_of(name, slot, codec).read(tensors, name, dtype) for name, slot in slots.items()}
    param = packed.read(tensors, "param", dtype) if packed is not None else tensors["param"].to(dtype)
    swapped, new = t.swap(param, values, training)
    made = _stored(core, weights, swapped)
    for name, value in new.items():
        made.update(codec_of(name, slots[name], codec).write(tensors, name, value))
    return made


def _codec(core: OptimizerCore, weights: Mapping[str, Tensor]) -> StateCodec | None:
    """What stores the parameter that these are the weights of, where that is more than one tensor."""
    return core.settings.param_codec if len(weights) > 1 else None


def _stored(core: OptimizerCore, weights: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
    """New weights as a parameter stores them, whose ``weights`` are those that they replace."""
    packed = _codec(core, weights)
    plain = {"param": narrowed(value, weights["param"].dtype, None)}
    return plain if packed is None else packed.write(weights, "param", value)
