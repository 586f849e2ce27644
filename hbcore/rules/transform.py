"""The protocol between a rule and the engine: :class:`Transform`, its :class:`Context` and its :class:`Slot` s.

A rule is a frozen dataclass with one pure function, ``update(u, s, c)``. It never mutates, never branches on a
hyperparameter and never reduces a tensor by itself: what it needs to know of a whole tensor it asks ``c.sum``, ``c.mean``,
``c.norm``, ``c.amax`` or ``c.numel``. In return the engine fuses, batches, compiles, compresses, shards and checkpoints it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import IntEnum
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hbcore.errors import HyperparameterError

State = Mapping[str, Tensor]
Scalar: TypeAlias = "Tensor | float"
"""A hyperparameter: a plain number where optimizers are built, a 0-d float64 tensor inside ``update``."""


class Domain(IntEnum):
    """The least of the model that a rule must see at once."""

    ELEMENTWISE = 0
    """One element at a time: Adam, Lion, weight decay."""
    TENSOR = 1
    """Elementwise, plus reductions over one tensor: caution, per-tensor clipping."""
    MATRIX = 2
    """A whole matrix: Muon, SOAP, PSGD."""
    MODEL = 3
    """Reductions over the whole model, or one preconditioner for a group: global clipping, low-rank PSGD."""


@dataclass(frozen=True)
class Bounds:
    """The allowed interval of a hyperparameter; prints as ``[0, 1)``."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def admit(self, value: float) -> bool:
        """Whether ``value`` lies inside. NaN never does."""
        return not (
            math.isnan(value)
            or (self.ge is not None and value < self.ge)
            or (self.gt is not None and value <= self.gt)
            or (self.le is not None and value > self.le)
            or (self.lt is not None and value >= self.lt)
        )

    def __str__(self) -> str:
        low = f"[{self.ge:g}" if self.ge is not None else f"({self.gt:g}" if self.gt is not None else "(-inf"
        high = f"{self.le:g}]" if self.le is not None else f"{self.lt:g})" if self.lt is not None else "inf)"
        return f"{low}, {high}"


def hyper(
    default: Any, *, ge: float | None = None, gt: float | None = None, le: float | None = None, lt: float | None = None
) -> Any:
    """Declare a dataclass field that may change every step without recompiling anything.

    Inside ``update`` the field is a 0-d float64 tensor (a tuple of them for a tuple default), bound to the param group's
    entry of the same name, so schedulers that write ``group["lr"]`` just work. Fields declared without ``hyper`` are
    structure: changing one makes another graph. The bounds are checked when the optimizer is built.
    """
    return field(default=default, metadata={"hyper": Bounds(ge, gt, le, lt)})


@dataclass(frozen=True)
class Slot:
    """One tensor that a rule remembers for each parameter.

    Args:
        shape: its logical shape; the parameter's own for elementwise rules.
        fill: the value it starts with.
        basis: how a change of basis acts on it: ``"rotate"`` (a first moment), ``"permute"`` (a second moment), ``None``.
    """

    shape: torch.Size
    fill: float = 0.0
    basis: Literal["rotate", "permute"] | None = None


def zeros(param: Tensor, basis: Literal["rotate", "permute"] | None = None) -> Slot:
    """A slot of the parameter's shape that starts at zero."""
    return Slot(param.shape, 0.0, basis)


class Context(NamedTuple):
    """What a rule may read besides its update and its state.

    ``param`` and ``grad`` come in the compute dtype: float32, or float64 for float64 parameters. ``step`` is a 0-d float64
    tensor, this parameter's own count, 1 on its first step. The reductions return 0-d tensors and reduce over one tensor
    (:attr:`Domain.TENSOR`) or over all parameters of the optimizer (:attr:`Domain.MODEL`).
    """

    param: Tensor
    grad: Tensor
    step: Tensor
    divide: Callable[[Tensor, Tensor, Scalar], Tensor]
    sum: Callable[[Tensor], Tensor]
    amax: Callable[[Tensor], Tensor]
    numel: Tensor

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over the rule's domain, 0-d."""
        return self.sum(x) / self.numel

    def norm(self, x: Tensor) -> Tensor:
        """The Euclidean norm of ``x`` over the rule's domain, 0-d."""
        return self.sum(x * x).sqrt()


@dataclass(frozen=True)
class Transform:
    """One pure step of a chain. Subclass it as a frozen dataclass; see :mod:`hbcore.rules.moments` for examples.

    Class attributes:
        name: a short identifier, unique in a chain; checkpoints record ``version`` under it.
        version: raised when the meaning of a slot changes; a migration then carries old checkpoints over.
        domain: the least of the model that ``update`` must see.
        stage: where :data:`hbcore.rules.stages.ORDER` puts it; rules leave it at ``"rule"``.
        owns_apply: ``update`` returns the new parameter rather than a step to subtract.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    domain: ClassVar[Domain] = Domain.ELEMENTWISE
    stage: ClassVar[str] = "rule"
    owns_apply: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if (
                "hyper" in f.metadata
                and isinstance(f.default, tuple)
                and (not isinstance(value, (tuple, list)) or len(value) != len(f.default))
            ):
                raise HyperparameterError(
                    f"{f.name}={value!r} is not {len(f.default)} numbers; pass a tuple of {len(f.default)}."
                )
        for key, value, bounds in self.hypers():
            for i, number in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
                label = f"{key}[{i}]" if isinstance(value, (tuple, list)) else key
                check_bounds(label, number, bounds)

    def hypers(self) -> Iterator[tuple[str, Any, Bounds]]:
        """Yield ``(field, value, bounds)`` for each field declared with :func:`hyper`, inner transforms' fields too."""
        for f in fields(self):
            value = getattr(self, f.name)
            if "hyper" in f.metadata:
                yield f.name, value, f.metadata["hyper"]
            elif isinstance(value, Transform):
                yield from value.hypers()

    def slots(self, param: Tensor) -> dict[str, Slot]:
        """The tensors this rule remembers for ``param``, by name. torch's names where torch has the slot."""
        return {}

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the new update and the new value of every slot. Pure: reads its arguments, writes nothing."""
        raise NotImplementedError(f"{type(self).__name__} defines no update(u, s, c)")


def check_bounds(label: str, number: Any, bounds: Bounds) -> None:
    """Raise :class:`HyperparameterError` unless ``number`` is a number within ``bounds``. Tensors pass: they are checked
    as the plain numbers they were made from."""
    if isinstance(number, Tensor):
        return
    if isinstance(number, bool) or not isinstance(number, Real):  # NumPy registers its own
        raise HyperparameterError(f"{label}={number!r} is a {type(number).__name__}; pass a number in {bounds}.")
    if not bounds.admit(float(number)):
        raise HyperparameterError(f"{label}={number!r} is outside {bounds}; pass a value inside that range.")
