"""Rules with two sets of weights: those to train with and those to evaluate with, one of which the parameters hold."""

from __future__ import annotations

from collections.abc import Iterator
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
    from hbcore.engine.optimizer import Optimizer


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
            before = {name: t.clone() for name, t in now.items()}
            for t in chain:
                if not self._return(optimizer, p, t, training, now, before):
                    _swap(optimizer, p, t, training)
            kept[p] = before
        self.training, self._kept = training, kept

    def forget(self, training: bool) -> None:
        """The parameters were stepped, or somebody else put weights of this kind into them."""
        self.training, self._kept = training, {}

    def _return(
        self, optimizer: Optimizer, p: Tensor, t: Transform, training: bool, now: dict[str, Tensor], before: dict[str, Tensor]
    ) -> bool:
        """Put the very weights back that were here before the last switch, if the present ones were made of them."""
        old = self._kept.get(p)
        if old is None:
            return False
        _put(now, old)
        made = not _swap(optimizer, p, t, not training) and all(torch.equal(now[name], before[name]) for name in now)
        _put(now, old if made else before)
        return made


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


def _put(targets: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])


def _swap(optimizer: Optimizer, p: Tensor, t: Transform, training: bool) -> bool:
    """Swap one parameter's weights in place; say whether slots changed with them."""
    codec, dtype, now = optimizer.settings.codec, compute_dtype(p.dtype), _weights(optimizer, p)
    packed = optimizer.settings.param_codec if len(now) > 1 else None
    stored = {name: local(value) for name, value in optimizer.state[p].items() if isinstance(value, Tensor)}
    tensors = {**stored, **now}
    slots = t.slots(now["param"])
    values = {name: codec_of(slot, codec).read(tensors, name, dtype) for name, slot in slots.items()}
    param = packed.read(tensors, "param", dtype) if packed is not None else now["param"].to(dtype)
    weights, new = t.swap(param, values, training)
    written = {"param": narrowed(weights, p.dtype, None)}
    if packed is not None:
        written = packed.write(tensors, "param", weights)
    for name, value in new.items():
        written.update(codec_of(slots[name], codec).write(tensors, name, value))
    for name, value in written.items():
        tensors[name].copy_(value)
    return bool(new)
