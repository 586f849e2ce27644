"""A model in bfloat16 but for its normalisation layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hbcore.distributed.placement import is_dtensor
from hbcore.engine.param_codec import is_held
from hbcore.errors import OptionError, ParameterError

M = TypeVar("M", bound=nn.Module)
Keep = str | Iterable[str] | Callable[[str, Any], bool]
"""Patterns of names such as ``"*.router"``, or ``keep(name, module or parameter)``."""

HALVES = (torch.bfloat16, torch.float16)
NORM = re.compile(r"Norm(Base|\dd)?$")
"""What the names of classes that normalise end with, torch's and others'."""


@torch.no_grad()
def cast_model(
    model: M, dtype: torch.dtype = torch.bfloat16, keep: Keep | None = None, report: Callable[[str], Any] | None = None
) -> M:
    """Cast a model's parameters to 16 bits, in place, and keep those of normalisation layers in float32.

    Kept are the own parameters of every module of a class, or a subclass of one, whose name ends in ``Norm``: LayerNorm,
    RMSNorm, GroupNorm, BatchNorm2d, and other libraries'. What is kept and has 16 bits becomes float32. Buffers stay as they
    are, running means among them; so do complex and integer parameters. A parameter that is tied stays tied, and is kept if one
    of its modules is. Gradients follow their parameters.

    A float32 layer between 16-bit layers gets inputs and makes outputs of another dtype than theirs: run the model under
    ``torch.autocast(device_type, dtype)``, which sees to that.

    Cast a model before it is wrapped and before its optimizer is made: an optimizer with ``param_ecc`` keeps float32 weights by
    itself, and state that exists already stays as it was. Whether there is an optimizer cannot be seen from here.

    Args:
        model: any module.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        keep: names of further modules, with all that is in them, or of parameters, as patterns (``"*.router"``); or a function
            of the name and the module or parameter, which is called for each.
        report: called with one line about what was cast and one for each parameter that was kept; ``print``, for example.

    Returns:
        The model.

    Raises:
        OptionError: ``dtype`` is none of the two.
        ParameterError: the model is sharded, or wrapped in DistributedDataParallel already, or a graph of it is alive.
    """
    if dtype not in HALVES:
        raise OptionError(f"cast_model: dtype={dtype!r} is not one of torch.bfloat16, torch.float16.")
    names = {p: name for name, p in model.named_parameters() if p.is_floating_point()}
    kept = _kept(model, keep)
    wanted = {p: (torch.float32 if p.dtype in HALVES else p.dtype) if p in kept else dtype for p in names}
    moving = [p for p, d in wanted.items() if p.dtype != d]
    for p in moving:
        if is_dtensor(p) or is_held(p):
            raise ParameterError(
                f"cast_model: {names[p]!r} is sharded, or in use by DistributedDataParallel or by a loss that is still there; "
                "cast the model first, then wrap it."
            )
    count = sum(p.numel() for p in moving)
    for p in moving:
        grad, p.grad = p.grad, None  # torch holds a gradient to its parameter's dtype
        p.data = p.data.to(wanted[p])
        p.grad = None if grad is None else grad.to(p.dtype)
    if report is not None:
        report(f"cast {len(moving)} parameters of {count:,} elements to {dtype}; kept {len(kept)}")
        for p in kept:
            report(f"kept {names[p]} in {p.dtype}")
    return model


def _kept(model: nn.Module, keep: Keep | None) -> dict[nn.Parameter, None]:
    """The floating-point parameters that are not cast, in the model's order."""
    chosen = _chooser(keep)
    found: set[Tensor] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if any(NORM.search(base.__name__) for base in type(module).__mro__):
            found.update(module.parameters(recurse=False))
        if name and chosen(name, module):
            found.update(module.parameters())
    for name, p in model.named_parameters(remove_duplicate=False):
        if chosen(name, p):
            found.add(p)
    return {p: None for p in model.parameters() if p in found and p.is_floating_point()}


def _chooser(keep: Keep | None) -> Callable[[str, Any], bool]:
    if callable(keep):
        return keep
    patterns = (keep,) if isinstance(keep, str) else tuple(keep or ())
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)
