"""The weights of the model that a checkpoint belongs to, from the model's own state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hbcore.errors import CheckpointError

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""Entries of a model's state dict that are no parameters."""


class Weights(NamedTuple):
    """The model's parameters, arranged as the optimizer has them.

    Attributes:
        names: of each group.
        tensors: of each group.
    """

    names: list[list[str]]
    tensors: list[list[Tensor]]


def arranged(model: Any, shapes: Sequence[Sequence[tuple[int, ...] | None]], names: Sequence[Sequence[str] | None]) -> Weights:
    """A model's parameters in the optimizer's groups: by the names that the checkpoint has, otherwise in the model's order.

    Args:
        model: ``model.state_dict()``.
        shapes: of the optimizer's parameters in each group, None where unknown.
        names: of the optimizer's parameters in each group, None for a group without.

    Raises:
        CheckpointError: it is no model's state dict, or its parameters are not the optimizer's.
    """
    if not isinstance(model, Mapping) or not all(isinstance(k, str) for k in model):
        raise CheckpointError("--model: expected a model's state dict, names -> tensors.")
    found = {k: v for k, v in model.items() if isinstance(v, Tensor) and k.rpartition(".")[2] not in BUFFERS}
    if names and all(names):
        chosen = [list(group or ()) for group in names]
        if missing := next((n for group in chosen for n in group if n not in found), None):
            raise CheckpointError(f"--model: the checkpoint has a parameter {missing!r}, which the model has not.")
    else:
        count = sum(map(len, shapes))
        if len(found) != count:
            raise CheckpointError(
                f"--model: the model has {len(found)} tensors and the checkpoint {count} parameters, without names: they "
                "cannot be matched. Save the optimizer's parameters alone, as a dict in its order."
            )
        order = iter(found)
        chosen = [[next(order) for _ in group] for group in shapes]
    tensors = [[found[name] for name in group] for group in chosen]
    for named, mine, wanted in zip(chosen, tensors, shapes, strict=True):
        for name, tensor, shape in zip(named, mine, wanted, strict=True):
            if shape is not None and tensor.numel() != math.prod(shape):  # state may have dimensions merged
                raise CheckpointError(
                    f"--model: {name!r} has the shape {tuple(tensor.shape)}, and the optimizer's state is of {shape}: the "
                    "model's parameters are in another order, or it is another model."
                )
    return Weights(chosen, tensors)
