"""What a class says of itself, for ``hbcore show`` and for documentation. Builds one optimizer on a small tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hbcore._version import __version__
from hbcore.engine.backends.triton.codegen import module_source
from hbcore.engine.graph.trace import trace
from hbcore.engine.planning.partition import example, partition
from hbcore.engine.shared_options import OPTIONS
from hbcore.optimizer import Optimizer
from hbcore.rules import route
from hbcore.state.expected import expected
from hbcore.wrappers.composite import Composite


def describe(cls: type[Optimizer | Composite], **options: Any) -> dict[str, Any]:
    """Facts about an optimizer class, as plain data: hyperparameters with bounds, options, slots, bytes, chain.

    Bytes per parameter are those of its state for a 32 x 32 float32 matrix, at the class's defaults but for ``options``: not
    every state grows with its parameter. Of a class that wraps others they are the first one's.
    """
    signature = inspect.signature(cls)
    build: Callable[..., Optimizer | Composite] = cls  # subclasses default everything but the parameters
    built = build([torch.nn.Parameter(torch.zeros(32, 32, device="cpu"))], **options)
    optimizer = built.children[0] if isinstance(built, Composite) else built
    own = [n for n, p in signature.parameters.items() if n != "params" and n not in OPTIONS and p.kind is not p.VAR_KEYWORD]
    own += [n for n in OPTIONS if n in getattr(cls, "own", ())]
    [group] = optimizer.param_groups
    param = group["params"][0]
    transforms = optimizer.core.chain.chain(group, param)
    bounds = {name: str(b) for t in optimizer.core.chain.forked(group) for name, _, b in t.hypers()}
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
            if n in own
        ],
        "options": [
            {"name": n, "default": signature.parameters[n].default if n in signature.parameters else o.default, "doc": o.doc}
            for n, o in OPTIONS.items()
            if n not in own
        ],
        "slots": slots,
        "bytes_per_parameter": float(sum(s["bytes_per_parameter"] for s in slots)),
        "chain": [t.name for t in transforms],
    }


def kernels(cls: type[Optimizer | Composite]) -> list[str]:
    """The source of the Triton kernels that an optimizer's segments become for a float32 matrix, at the class's defaults.

    Raises:
        TraceError: a rule broke the tracing contract.
        CompileError: an operation is outside the generator's vocabulary.
    """
    build: Callable[[list[torch.nn.Parameter]], Optimizer | Composite] = cls
    param = torch.nn.Parameter(torch.zeros(8, 8, device="cpu"))
    built = build([param])
    optimizer = built.children[0] if isinstance(built, Composite) else built
    [group] = optimizer.param_groups
    spec = replace(optimizer.core.chain.spec(group), branches=route.branches(optimizer.core.chain.forked(group), param))
    sources = []
    for segment in partition(spec, group, param).segments:
        transforms = segment.transforms(example(segment, group))
        slots = {name: slot for t in transforms for name, slot in t.slots(param).items()}
        label = " -> ".join(t.name for t in transforms) or "nothing but copies"
        program = trace(segment, segment.dtypes(param, param.dtype, slots), label)
        sources.append(module_source(program, label, __version__))
    return sources
