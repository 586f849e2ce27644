"""A model's state dict with float32 weights, where ``param_ecc`` has split them between the model and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hbcore.engine.core import OptimizerCore
from hbcore.engine.param_codec import full_of, put_full, settle
from hbcore.errors import ParameterError


@torch.no_grad()
def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``model.state_dict()`` with the float32 weights that ``param_ecc`` stores in fewer bits: parameter and correction joined.

    Changes nothing. Without ``param_ecc`` it is ``model.state_dict()``. Weights that are tied are one tensor under several
    names, and everything lies on the device where the model has it. While the parameters hold other weights, after
    ``optimizer.eval()`` or within ``ema_weights()``, so does this.

    Such a state dict loads into a float32 model with ``load_state_dict``, and loses nothing there. A model that ``param_ecc``
    has narrowed would round it to bfloat16: :func:`load_full_state` keeps all bits of it.

    Args:
        model: any module, wrapped or not; its own names are used.
        optimizer: the optimizer of its parameters, or a composite such as :class:`hbcore.SplitOpt`.

    Returns:
        The state dict, with torch's metadata.

    Raises:
        ParameterError: none of the parameters that the optimizer has corrections for is in the model.
    """
    full: dict[Tensor, Tensor] = {}
    for core in _cores(optimizer):
        settle(core, final=False)
        for p in (p for group in core.groups for p in group["params"]):
            value = full_of(core, p)
            if value is not None:
                full[p] = value
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    if full and not any(isinstance(t, Tensor) and t in full for t in state.values()):
        raise ParameterError(
            f"full_state: the model has none of the parameters of {type(optimizer).__name__}; pass the model that it was built "
            "for."
        )
    for name, t in state.items():
        if isinstance(t, Tensor):
            state[name] = full[t] if t in full else t.detach()
    return state


@torch.no_grad()
def load_full_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], strict: bool = True) -> Any:
    """``model.load_state_dict(state, strict)``, and all bits of float32 weights: ``param_ecc``'s corrections are set to match.

    It takes the result of :func:`full_state`, or the state dict of a run without ``param_ecc``. The optimizer's own state dict
    may be loaded before or after it.

    Args:
        model, optimizer: as for :func:`full_state`.
        state: any state dict of the model.
        strict: as in ``model.load_state_dict``.

    Returns:
        What ``model.load_state_dict`` returns.
    """
    cores = [*_cores(optimizer)]
    for core in cores:
        settle(core, final=False)
    result = model.load_state_dict(state, strict=strict)
    names = {t: name for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, nn.Parameter)}
    for core in cores:
        for p in (p for group in core.groups for p in group["params"]):
            given = state.get(names.get(p, ""))
            if isinstance(given, Tensor) and given.dtype in (torch.float32, torch.float64):
                core.corrections.waiting.pop(p, None)
                put_full(core, p, given)
    return result


def _cores(optimizer: Any) -> Iterator[OptimizerCore]:
    """The engine's part of an optimizer, or of each that it is composed of; nothing for other libraries' optimizers."""
    for child in getattr(optimizer, "children", [optimizer]):
        core = getattr(child, "core", None)
        if isinstance(core, OptimizerCore):
            yield core
