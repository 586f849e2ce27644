"""Validation of the ``params`` argument before it reaches torch; messages name the parameter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from hbcore.errors import ParameterError, ParameterTypeError


def check_params(optimizer: str, params: Any, existing: Sequence[dict[str, Any]] = ()) -> list[Any]:
    """Validate ``params`` and return it as a list of tensors, ``(name, tensor)`` pairs or groups.

    Raises:
        ParameterTypeError: it is a bare tensor, or contains something other than tensors.
        ParameterError: it is empty, contains a parameter twice, or one that cannot be optimized.
    """
    if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
        kind = params.type() if isinstance(params, Tensor) else type(params).__name__
        raise ParameterTypeError(
            f"params argument given to the optimizer should be an iterable of Tensors or dicts, but got {kind}; "
            f"pass {optimizer}(model.parameters(), ...) or {optimizer}([tensor], ...)."
        )
    groups = list(params)
    if not groups:
        raise ParameterError(f"{optimizer} got an empty parameter list; pass model.parameters(), which can be read only once.")
    seen: dict[int, str | tuple[int, int]] = {id(p): (g, i) for g, o in enumerate(existing) for i, p in enumerate(o["params"])}
    if isinstance(groups[0], dict):
        for i, g in enumerate(groups):
            if not isinstance(g, dict):
                raise ParameterTypeError(
                    f"{optimizer}: entry {i} of params is a {type(g).__name__} among groups; pass dicts only."
                )
        groups = [{**g, "params": _members(optimizer, g, len(existing) + i, seen, existing)} for i, g in enumerate(groups)]
    else:
        groups = _members(optimizer, {"params": groups}, len(existing), seen, existing)
    return groups


def describe_param(groups: Sequence[dict[str, Any]], group: int, index: int) -> str:
    """How messages refer to a parameter: by its name or else its index, with its shape."""
    names = groups[group].get("param_names")
    label = repr(names[index]) if names else f"number {index}"
    return f"parameter {label} of group {group}, {shape_of(groups[group]['params'][index])},"


def is_lazy(p: Tensor) -> bool:
    """Whether a parameter of a lazy module has no shape yet."""
    return isinstance(p, UninitializedParameter)


def shape_of(p: Tensor) -> str:
    """How messages tell a parameter's shape."""
    return "not initialized yet" if is_lazy(p) else f"shape {tuple(p.shape)}"


def _members(
    optimizer: str,
    group: dict[str, Any],
    index: int,
    seen: dict[int, str | tuple[int, int]],
    existing: Sequence[dict[str, Any]],
) -> list[Any]:
    if "params" not in group:
        raise ParameterError(f"{optimizer}: parameter group {index} has no 'params'; it has {sorted(map(str, group))}.")
    given = group["params"]
    if isinstance(given, (set, frozenset)):
        raise ParameterTypeError(
            f"{optimizer}: parameter group {index} is a {type(given).__name__}, whose order changes between runs; pass a list."
        )
    members = [given] if isinstance(given, Tensor) else list(given)
    for i, member in enumerate(members):
        name, p = member if isinstance(member, tuple) and len(member) == 2 else (None, member)
        if not isinstance(p, Tensor):
            raise ParameterTypeError(
                f"{optimizer}: entry {i} of parameter group {index} is a {type(p).__name__}; an optimizer takes tensors."
            )
        label = f"parameter {name!r}" if name is not None else f"parameter number {i} of group {index}"
        label = f"{label}, {shape_of(p)},"
        if id(p) in seen:
            before = seen[id(p)]
            other = before if isinstance(before, str) else describe_param(existing, *before)
            raise ParameterError(f"{optimizer}: {label} is the same tensor as {other} pass each parameter once.")
        if not p.is_leaf and not p.retains_grad:
            raise ParameterError(f"{optimizer}: {label} is not a leaf; can't optimize a non-leaf Tensor. Pass the leaf.")
        if p.layout is not torch.strided or not (p.is_floating_point() or p.is_complex()):
            raise ParameterError(f"{optimizer}: {label} is {p.layout} of {p.dtype}; pass dense floating-point parameters.")
        seen[id(p)] = label
    return members
