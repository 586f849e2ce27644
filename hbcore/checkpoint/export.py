"""State dicts for other libraries: plain float tensors under torch's names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hbcore.checkpoint import schema
from hbcore.checkpoint.counterpart import counterpart_of, sent
from hbcore.checkpoint.save import MODE
from hbcore.checkpoint.spreading import spread_as
from hbcore.distributed.placement import local
from hbcore.errors import CheckpointError
from hbcore.rules.numerics import compute_dtype

if TYPE_CHECKING:
    from hbcore.optimizer import Optimizer

FORMATS = ("torch",)


def export(optimizer: Optimizer, format: str = "torch") -> dict[str, Any]:
    """A state dict that other libraries' optimizers can load: every codec decoded, hbcore's own entries left out.

    Weights are the model's, and not in it. Under ``param_ecc``, save :func:`hbcore.full_state` along with it:
    ``model.state_dict()`` has bfloat16.

    An optimizer of torch.optim with the same rule, the class's :attr:`~hbcore.Optimizer.counterpart`, resumes from it:
    ``torch_optimizer.load_state_dict(hbcore.export(ours))``. A :class:`StateWarning` names what torch goes on without.
    torch.optim divides by ``sqrt(v) + eps``: hbcore takes the same steps with ``division_backend="eps_add"``.

    Args:
        optimizer: any hbcore optimizer.
        format: ``"torch"``.

    Returns:
        ``{"state": {index: {slot: tensor}}, "param_groups": [...]}``, slots in float32, or float64 for float64 parameters.

    Raises:
        CheckpointError: the format is unknown.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format={format!r} is not one of {', '.join(FORMATS)}.")
    whole = optimizer.state_dict()
    exported: dict[int, dict[str, Any]] = {}
    index = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if index in whole["state"]:
                entry = whole["state"][index]
                exported[index] = {"step": entry["step"]}
                for slot in optimizer.core.chain.expected(group, p):
                    if slot.rule != "param_ecc":
                        first = entry[next(iter(slot.parts(p)))]
                        parts = {name: local(entry[name]) for name in slot.parts(p)}
                        value = slot.codec.read(parts, slot.name, compute_dtype(p.dtype))
                        value = torch.view_as_complex(value) if p.is_complex() else value
                        exported[index][slot.name] = spread_as(value, first, p, slot.shape)
            index += 1
    groups = [{k: v for k, v in group.items() if k not in (schema.KEY, MODE)} for group in whole["param_groups"]]
    decoded = {"state": exported, "param_groups": groups}
    counterpart = counterpart_of(type(optimizer))
    return decoded if counterpart is None else sent(optimizer.core, counterpart, decoded)
