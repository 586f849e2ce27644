"""What a class says of itself, for ``hbcore show`` and for documentation. Builds one optimizer on a small tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from hbcore.engine.optimizer import Optimizer
from hbcore.engine.options import OPTIONS
from hbcore.state.expected import expected


def describe(cls: type[Optimizer]) -> dict[str, Any]:
    """Facts about an optimizer class, as plain data: hyperparameters with bounds, options, slots, bytes, chain.

    Bytes per parameter are those of its state for an 8 x 8 float32 matrix at the class's defaults.
    """
    signature = inspect.signature(cls)
    build: Callable[[list[torch.nn.Parameter]], Optimizer] = cls  # subclasses default everything but the parameters
    optimizer = build([torch.nn.Parameter(torch.zeros(8, 8))])
    [group] = optimizer.param_groups
    param = group["params"][0]
    transforms = optimizer._chain_of(group, param)
    bounds = {name: str(b) for t in optimizer._transforms(group) for name, _, b in t.hypers()}
    slots = [
        {
            "name": part,
            "transform": slot.rule,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes_per_parameter": dtype.itemsize * slot.shape.numel() / param.numel(),
        }
        for slot in expected(transforms, param, optimizer.settings.codec)
        for part, dtype in slot.parts(param).items()
    ]
    return {
        "name": cls.__name__,
        "doc": (inspect.getdoc(cls) or "").split("\n\n")[0],
        "hyperparameters": [
            {"name": n, "default": p.default, "bounds": bounds.get(n, ""), "scheduled": n in bounds}
            for n, p in signature.parameters.items()
            if n != "params" and n in cls.own
        ],
        "options": [
            {"name": n, "default": cls.option_defaults.get(n, o.default), "doc": o.doc}
            for n, o in OPTIONS.items()
            if n not in cls.own
        ],
        "slots": slots,
        "bytes_per_parameter": float(sum(s["bytes_per_parameter"] for s in slots)),
        "chain": [t.name for t in transforms],
    }
