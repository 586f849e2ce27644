"""Rules with two sets of weights: those to train with and those to evaluate with, one of which the parameters hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hbcore.distributed.placement import local
from hbcore.errors import OptionError
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.stages import ParameterEMA
from hbcore.rules.transform import Transform
from hbcore.state.codec import codec_of, narrowed

if TYPE_CHECKING:
    from hbcore.engine.optimizer import Optimizer


class Kept(NamedTuple):
    """The weights that a parameter had before they were swapped, and its version after: to see whether anyone wrote since."""

    weights: Tensor
    version: int


class Modes:
    """Which set of weights an optimizer's parameters hold.

    Attributes:
        training: whether it is the one to train with.
        averaging: whether the parameters hold their moving averages for the moment.
    """

    def __init__(self) -> None:
        self.training = True
        self.averaging = False
        self._kept: dict[Tensor, Kept] = {}

    def switch(self, optimizer: Optimizer, training: bool) -> None:
        """Change to the other set; nothing happens where it is there already.

        Back in training the weights are those of before, bit for bit, unless somebody changed the parameters meanwhile.
        """
        if training == self.training:
            return
        kept: dict[Tensor, Kept] = {}
        for p, chain in _swapped(optimizer):
            part = local(p.detach())
            before = part.clone()
            old = self._kept.get(p)
            if old is not None and old.version == p._version:
                part.copy_(old.weights)
            else:
                for t in chain:
                    _swap(optimizer, p, part, t, training)
            kept[p] = Kept(before, p._version)
        self.training, self._kept = training, kept

    def forget(self, training: bool) -> None:
        """Somebody else put weights of this kind into the parameters."""
        self.training, self._kept = training, {}


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Put the moving averages of ``use_ema=True`` into the parameters, and the parameters' own values back afterwards.

    Raises:
        OptionError: the optimizer keeps none.
    """
    if not optimizer.settings.use_ema:
        raise OptionError(f"{type(optimizer).__name__} keeps no average of the parameters; pass use_ema=True.")
    before: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if float(state.get("step", 0)) > 0:
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
            chain = [t for t in optimizer.structure.bound(group, p) if has_modes(t)]
            if chain and optimizer.state.get(p):
                yield p, chain


def _swap(optimizer: Optimizer, p: Tensor, part: Tensor, t: Transform, training: bool) -> None:
    state, codec, dtype = optimizer.state[p], optimizer.settings.codec, compute_dtype(p.dtype)
    packed = optimizer.settings.param_codec
    stored = {name: local(value) for name, value in state.items() if isinstance(value, Tensor)}
    tensors = {**stored, "param": part}
    slots = t.slots(part)
    values = {name: codec_of(slot, codec).read(tensors, name, dtype) for name, slot in slots.items()}
    packs = packed is not None and any(name.startswith("param#") for name in stored)
    param = packed.read(tensors, "param", dtype) if packed is not None and packs else part.to(dtype)
    weights, new = t.swap(param, values, training)
    written = {"param": narrowed(weights, part.dtype, None)}
    if packed is not None and packs:
        written = packed.write(tensors, "param", weights)
    for name, value in new.items():
        written.update(codec_of(slots[name], codec).write(tensors, name, value))
    with torch.no_grad():
        for name, value in written.items():
            tensors[name].copy_(value)
