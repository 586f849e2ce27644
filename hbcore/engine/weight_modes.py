"""Rules with two sets of weights: those to train with and those to evaluate with, one of which the parameters hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbcore.distributed.placement import local
from hbcore.errors import OptionError, RuleError
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.stages import ParameterEMA
from hbcore.rules.transform import Transform
from hbcore.state.codec import codec_of, narrowed

if TYPE_CHECKING:
    from hbcore.optimizer import Optimizer


class Modes:
    """Which set of weights an optimizer's parameters hold.

    Attributes:
        training: whether it is the one to train with.
        averaging: whether the parameters hold their moving averages for the moment.
    """

    def __init__(self) -> None:
        self.training = True
        self.averaging = False
        self._kept: dict[Tensor, dict[str, Tensor]] = {}

    def switch(self, optimizer: Optimizer, training: bool) -> None:
        """Change to the other set; nothing happens where it is there already.

        Back again the weights are those of before, bit for bit, unless somebody changed the parameters meanwhile.
        """
        if self.averaging:
            raise RuleError("train() and eval() within ema_weights() would mix two sets of weights; call them outside.")
        if training == self.training:
            return
        kept: dict[Tensor, dict[str, Tensor]] = {}
        for p, chain in _swapped(optimizer):
            now = _weights(optimizer, p)
            kept[p] = {name: t.clone() for name, t in now.items()}
            for t in chain:
                _put(
                    _tensors(optimizer, p), self._back(optimizer, p, t, training, now) or _other(optimizer, p, t, now, training)
                )
        self.training, self._kept = training, kept

    def forget(self, training: bool) -> None:
        """The parameters were stepped, or somebody else put weights of this kind into them."""
        self.training, self._kept = training, {}

    def _back(
        self, optimizer: Optimizer, p: Tensor, t: Transform, training: bool, now: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """The very weights that were here before the last switch, if the present ones were made of them and of nothing else."""
        old = self._kept.get(p)
        if old is None:
            return None
        made = _other(optimizer, p, t, old, not training)
        return old if made.keys() == now.keys() and all(torch.equal(made[name], now[name]) for name in now) else None


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Put the moving averages of ``use_ema=True`` into the parameters, and the parameters' own values back afterwards.

    Raises:
        OptionError: the optimizer keeps none.
    """
    if not optimizer.settings.use_ema:
        raise OptionError(f"{type(optimizer).__name__} keeps no average of the parameters; pass use_ema=True.")
    if optimizer.modes.averaging:
        raise RuleError("the parameters hold their averages already; leave ema_weights() first.")
    before: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if "param_ema" in state and float(state.get("step", 0)) > 0:
                    [ema] = [t for t in optimizer.structure.bound(group, p) if isinstance(t, ParameterEMA)]
                    part = local(p.detach())
                    stored = {name: local(value) for name, value in state.items() if isinstance(value, Tensor)}
                    value = optimizer.settings.codec.read(stored, "param_ema", compute_dtype(p.dtype))
                    before.append((part, part.clone()))
                    part.copy_(ema.average({"param_ema": value}, state["step"].double().cpu()))
    optimizer.modes.averaging = True
    try:
        yield
    finally:
        optimizer.modes.averaging = False
        for part, own in before:
            part.copy_(own)


def has_modes(t: Transform) -> bool:
    """Whether a rule has two sets of weights."""
    return type(t).swap is not Transform.swap


def _swapped(optimizer: Optimizer) -> Iterator[tuple[Tensor, list[Transform]]]:
    """The parameters with state of a rule with two sets of weights."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            chain = [t for t in optimizer.structure.bound(group, p) if has_modes(t) and state.keys() >= t.slots(p).keys()]
            if chain:
                yield p, chain


def _weights(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """This rank's part of a parameter, and what ``param_ecc`` keeps beside it."""
    beside = {name: local(t) for name, t in optimizer.state[p].items() if str(name).startswith("param#")}
    return {"param": local(p.detach()), **beside}


def _tensors(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Everything that a swap may read or write of a parameter, this rank's parts."""
    stored = {name: local(value) for name, value in optimizer.state[p].items() if isinstance(value, Tensor)}
    return {**stored, "param": local(p.detach())}


def _put(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        targets[name].copy_(value)


def _other(optimizer: Optimizer, p: Tensor, t: Transform, weights: Mapping[str, Tensor], training: bool) -> dict[str, Tensor]:
    """What a swap of ``weights`` makes of them, and of the rule's slots if they change, as stored. Writes nothing."""
    codec, dtype = optimizer.settings.codec, compute_dtype(p.dtype)
    packed = optimizer.settings.param_codec if len(weights) > 1 else None
    tensors = {**_tensors(optimizer, p), **weights}
    slots = t.slots(tensors["param"])
    values = {name: codec_of(slot, codec).read(tensors, name, dtype) for name, slot in slots.items()}
    param = packed.read(tensors, "param", dtype) if packed is not None else tensors["param"].to(dtype)
    swapped, new = t.swap(param, values, training)
    plain = {"param": narrowed(swapped, tensors["param"].dtype, None)}
    made = plain if packed is None else packed.write(tensors, "param", swapped)
    for name, value in new.items():
        made.update(codec_of(slots[name], codec).write(tensors, name, value))
    return made
