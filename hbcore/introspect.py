"""What a class says of itself, for ``hbcore show`` and for documentation. Builds one optimizer on a small tensor."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hbcore._version import __version__
from hbcore.engine.backends.triton.codegen import module_source
from hbcore.engine.graph.trace import trace
from hbcore.engine.planning.partition import example, partition
from hbcore.engine.shared_options import OPTIONS
from hbcore.errors import OptionError, StateWarning
from hbcore.footprint import memory
from hbcore.optimizer import Optimizer
from hbcore.rules import route
from hbcore.rules.hyper import Role
from hbcore.rules.roles import named
from hbcore.state.expected import expected
from hbcore.wrappers.composite import Composite
from hbcore.wrappers.split import SplitOpt


def describe(cls: type[Optimizer | Composite], **options: Any) -> dict[str, Any]:
    """Facts about an optimizer class, as plain data: hyperparameters with bounds, options, slots, bytes, chain.

    Bytes per parameter are those of its state for a 32 x 32 float32 matrix, at the class's defaults but for ``options``: not
    every state grows with its parameter. Slots that are derived are among them, since they take memory, though checkpoints have
    none. ``memory`` has the parameter and its gradient too, see :func:`hbcore.memory`. Of a class that wraps others they are
    the first one's.
    """
    signature = inspect.signature(cls)
    build: Callable[..., Optimizer | Composite] = cls  # subclasses default everything but the parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StateWarning)  # param_ecc narrows nobody's parameter here
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
            "dtype": str(stored.dtype).removeprefix("torch."),
            "bytes_per_parameter": stored.nbytes / param.numel(),
            "derived": slot.derived,
        }
        for slot in expected(transforms, param, optimizer.settings.codec, optimizer.settings.param_codec, derived=True)
        for part, stored in slot.blank(torch.empty_like(param, device="meta")).items()
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
        "memory": dict(memory([torch.nn.Parameter(torch.empty(32, 32, device="meta"))], cls, **options).per_parameter),
        "chain": [t.name for t in transforms],
    }


def is_described(cls: type[Any]) -> bool:
    """Whether :func:`describe` can tell what the class is made of: hbcore's own classes that need nothing but parameters."""
    return issubclass(cls, (Optimizer, Composite)) and not issubclass(cls, SplitOpt)


def roles(cls: Callable[..., Any]) -> dict[str, Role | tuple[Role | None, ...]]:
    """The role of each argument of the constructor that has one, see :class:`hbcore.api.Role`; empty for classes of others.

    A group's entry has the name of the rule's field that it feeds (ADR 0004), and so has the argument.
    """
    if not (isinstance(cls, type) and is_described(cls) and issubclass(cls, Optimizer)):
        return {}
    build: Callable[..., Optimizer] = cls  # subclasses default everything but the parameters
    optimizer = build([torch.nn.Parameter(torch.zeros(32, 32, device="cpu"))])
    chain = optimizer.core.chain.every(optimizer.param_groups[0])
    return {name: role for name, role in named(chain).items() if name in inspect.signature(cls).parameters}


def outline(cls: type[Any]) -> dict[str, Any]:
    """What :func:`describe` says, as far as it is known of any other class.

    Hyperparameters are those of the signature, and state is what a step creates, if the class can be built from parameters
    alone: torch.optim's optimizers can. ``note`` says what is not known.
    """
    parameters = inspect.signature(cls).parameters.values()
    facts: dict[str, Any] = {
        "name": cls.__name__,
        "doc": (inspect.getdoc(cls) or "").split("\n\n")[0],
        "hyperparameters": [
            {"name": p.name, "bounds": "", "scheduled": False} | ({} if p.default is p.empty else {"default": p.default})
            for p in parameters
            if p.name != "params" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ],
        "options": [],
        "slots": [],
        "bytes_per_parameter": 0.0,
        "memory": {},
        "chain": [],
    }
    if issubclass(cls, SplitOpt) or not issubclass(cls, torch.optim.Optimizer):
        return facts | {"note": "its state is that of the optimizers or rules that it is made of"}
    try:
        slots = _stepped(cls)
    except Exception as error:  # somebody else's constructor and step may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return facts | {"note": f"state unknown: a trial step failed with {reason}"}
    note = "not built on hbcore's engine: no shared options, no generated kernel"
    return facts | {"slots": slots, "bytes_per_parameter": float(sum(s["bytes_per_parameter"] for s in slots)), "note": note}


def _stepped(cls: type[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The tensors that a step creates for a 32 x 32 float32 matrix."""
    param = torch.nn.Parameter(torch.ones(32, 32, device="cpu"))
    build: Callable[..., torch.optim.Optimizer] = cls
    optimizer = build([param])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        closure()
        optimizer.step(closure)  # type: ignore[arg-type]
    return [
        {
            "name": name,
            "transform": "",
            "dtype": str(value.dtype).removeprefix("torch."),
            "bytes_per_parameter": value.dtype.itemsize * value.numel() / param.numel(),
            "derived": False,
        }
        for name, value in optimizer.state[param].items()
        if isinstance(value, torch.Tensor)
    ]


def kernels(cls: type[Optimizer | Composite]) -> list[str]:
    """The source of the Triton kernels that an optimizer's segments become for a float32 matrix, at the class's defaults.

    Raises:
        OptionError: the class is not built on hbcore's engine, or is made of other optimizers.
        TraceError: a rule broke the tracing contract.
        CompileError: an operation is outside the generator's vocabulary.
    """
    if not issubclass(cls, (Optimizer, Composite)):
        raise OptionError(f"--kernel: {cls.__name__} is not built on hbcore's engine, which generates no kernel for it")
    if not is_described(cls):
        raise OptionError(f"--kernel: {cls.__name__} is made of other optimizers; name one of them")
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
