"""The protocol between a rule and the engine: :class:`Transform`, its :class:`Context` and its :class:`Slot` s.

A rule is a frozen dataclass with one pure function, ``update(u, s, c)``. It never mutates, never branches on a
hyperparameter and never reduces a tensor by itself: what it needs to know of a whole tensor it asks ``c.sum``, ``c.mean``,
``c.norm``, ``c.amax`` or ``c.numel``. In return the engine fuses, batches, compiles, compresses, shards and checkpoints it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hbcore.errors import HyperparameterError, RuleError
from hbcore.rules.numerics import Scalar, compute_dtype
from hbcore.rules.views import Block

State = Mapping[str, Tensor]


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


Role = Literal["first_moment", "second_moment", "weight_decay"]
"""What a hyperparameter is to its rule: the decay rate of a first or second moment, or the weight decay."""


def hyper(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    role: Role | tuple[Role | None, ...] | None = None,
) -> Any:
    """Declare a dataclass field that may change every step without recompiling anything.

    Inside ``update`` the field is a 0-d float64 tensor (a tuple of them for a tuple default), bound to the param group's
    entry of the same name, so schedulers that write ``group["lr"]`` just work. Fields declared without ``hyper`` are
    structure: changing one makes another graph. The bounds are checked when the optimizer is built.

    Args:
        default: a number, or a tuple of numbers.
        ge, gt, le, lt: bounds of each number.
        role: what the number is to the rule; for a tuple, one role or None for each of its numbers. ``palm=True`` changes what
            has the role ``"second_moment"``, ``mars=True`` reads the first ``"first_moment"``, and a rule with a
            ``"weight_decay"`` decays the weights itself. An option that needs a role which no hyperparameter has is refused.

    Raises:
        RuleError: a role does not exist, or the roles of a tuple are not as many as its numbers.
    """
    each = role if isinstance(role, tuple) else (role,)
    if unknown := [r for r in each if r is not None and r not in get_args(Role)]:
        raise RuleError(f"hyper(role={unknown[0]!r}): there is no such role; pass one of {', '.join(get_args(Role))}.")
    numbers = default if isinstance(default, tuple) else (default,)
    if role is not None and (isinstance(role, tuple) != isinstance(default, tuple) or len(each) != len(numbers)):
        raise RuleError(f"hyper({default!r}, role={role!r}): pass one role for a number, a tuple of as many for a tuple.")
    return field(default=default, metadata={"hyper": Bounds(ge, gt, le, lt), "role": role})


@dataclass(frozen=True)
class Slot:
    """One tensor that a rule remembers for each parameter.

    Args:
        shape: its logical shape; the parameter's own for elementwise rules.
        fill: the value it starts with.
        basis: how a change of basis acts on it: ``"rotate"`` (a first moment), ``"permute"`` (a second moment), ``None``.
        exact: stored in the compute dtype whatever codec the optimizer has: preconditioners, and small numbers.
    """

    shape: torch.Size
    fill: float = 0.0
    basis: Literal["rotate", "permute"] | None = None
    exact: bool = False


def zeros(param: Tensor, basis: Literal["rotate", "permute"] | None = None) -> Slot:
    """A slot of the parameter's shape that starts at zero."""
    return Slot(param.shape, 0.0, basis)


def unavailable(*_: Any) -> Any:
    """What the parts of a :class:`Context` are that an elementwise rule has no use for."""
    raise RuleError("c.probe, c.noise and c.apply are for rules of Domain.MATRIX; declare `domain = Domain.MATRIX`.")


class Context(NamedTuple):
    """What a rule may read besides its update and its state.

    ``param`` and ``grad`` come in the compute dtype: float32, or float64 for float64 parameters. ``step`` is a 0-d float64
    tensor, this parameter's own count, 1 on its first step. The reductions return 0-d tensors and reduce over one tensor
    (:attr:`Domain.TENSOR`) or over all parameters of the optimizer (:attr:`Domain.MODEL`).

    What follows ``numel`` is for rules of :attr:`Domain.MATRIX`, which see stacks ``[B, *shape]`` of equally shaped blocks:

    * ``param`` and ``grad`` are there for a rule whose ``needs`` name them; reading them otherwise is an error.
    * ``refresh``: the expensive part is due this step, see :meth:`Transform.rate`.
    * ``probe(like)``: standard normal numbers of ``like``'s shape and dtype, drawn from the optimizer's seed, each block's
      identity and the step; the second call of a step draws others. The same on every rank and device; the global
      generators are never used. ``noise(like)`` is the same, uniform in [0, 1).
    * ``apply(inner, u, s)``: run the elementwise rule ``inner`` on the stack as one lane: ``inner.update(u, s, c)``, fused
      where a backend can. Returns its update and its slots' new values, which the rule hands on with its own.
    """

    param: Tensor
    grad: Tensor
    step: Tensor
    divide: Callable[[Tensor, Tensor, Scalar], Tensor]
    sum: Callable[[Tensor], Tensor]
    amax: Callable[[Tensor], Tensor]
    numel: Tensor
    refresh: bool = True
    probe: Callable[[Tensor], Tensor] = unavailable
    noise: Callable[[Tensor], Tensor] = unavailable
    apply: Callable[[Transform, Tensor, State], tuple[Tensor, dict[str, Tensor]]] = unavailable

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
        primes: the first gradient only prepares the state, see :meth:`prime`; it moves no parameter and counts no step.
        needs: what a matrix rule reads of its context besides the update: of ``{"param", "grad"}``.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    domain: ClassVar[Domain] = Domain.ELEMENTWISE
    stage: ClassVar[str] = "rule"
    owns_apply: ClassVar[bool] = False
    primes: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

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

    def joins(self, param: Tensor, step: Tensor) -> dict[str, Tensor]:
        """Elementwise rules: what slots begin with where the rule is new to a parameter that took ``step`` steps without it.

        Those that are not returned begin as ever. ``param`` is in the compute dtype, ``step`` 0-d float64.
        """
        return {}

    def scalars(self) -> dict[str, float]:
        """Numbers that a param group carries from step to step (a sum of weights, a largest lr), with their first values.

        ``update`` finds them in ``s`` under their names, 0-d float64, and returns their new values with the slots' ones. They
        may depend on hyperparameters and on each other, never on a tensor or on ``c.step``.
        """
        return {}

    def rate(self, k: int) -> float:
        """How many refreshes the group's step ``k`` (1 on its first) is worth, in [0, 1].

        ``c.refresh`` is true whenever the running sum of the rates passes a whole number: 1 refreshes always, 1 / f at every
        f-th step. The engine carries the sum, and checkpoints keep it.
        """
        return 1.0

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        """Matrix rules: how a parameter of ``shape`` is cut into stacks of equal blocks; see :mod:`hbcore.rules.views`."""
        raise NotImplementedError(f"{type(self).__name__} is a matrix rule and defines no blocks(shape)")

    def working_dtype(self, param: Tensor) -> torch.dtype:
        """Matrix rules: the dtype in which ``update`` receives its stack; the compute dtype unless overridden."""
        return compute_dtype(param.dtype)

    def prime(self, u: Tensor, s: State, c: Context) -> dict[str, Tensor]:
        """Matrix rules that say ``primes``: the state that the first update ``u`` of each block leads to."""
        raise NotImplementedError(f"{type(self).__name__} says that it primes and defines no prime(u, s, c)")

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the new update and the new value of every slot. Pure: reads its arguments, writes nothing.

        An elementwise rule may be handed any shape. A matrix rule is handed a stack ``[B, *shape]`` of equal blocks, and
        slots of ``[B, *slot.shape]``, where ``slots`` was asked with a tensor of the block's shape; it treats each block by
        itself, and slots that it does not return keep their values.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no update(u, s, c)")

    def update_stacks(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        """Matrix rules: what ``update`` returns for each of several stacks, in order; their blocks' shapes differ.

        The engine hands over all that a rule has to do at a step, and writes each result before it asks for the next. By
        default they are computed one after another. A rule overrides this where one operation can work for several stacks.
        """
        return (self.update(u, s, c) for u, s, c in stacks)

    def swap(self, param: Tensor, s: State, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Rules with two sets of weights: the other set's parameter, and the slots that change with it. Pure, elementwise.

        Args:
            param: the parameter in the compute dtype.
            s: the rule's slots.
            training: whether the weights to train with are asked for, rather than those to evaluate with.
        """
        raise NotImplementedError(f"{type(self).__name__} has one set of weights")


def check_bounds(label: str, number: Any, bounds: Bounds) -> None:
    """Raise :class:`HyperparameterError` unless ``number`` is a number within ``bounds``. Tensors, and what stands for one,
    pass: they are checked as the plain numbers they were made from."""
    if isinstance(number, Tensor) or hasattr(type(number), "__torch_function__"):
        return
    if isinstance(number, bool) or not isinstance(number, Real):  # NumPy registers its own
        raise HyperparameterError(f"{label}={number!r} is a {type(number).__name__}; pass a number in {bounds}.")
    if not bounds.admit(float(number)):
        raise HyperparameterError(f"{label}={number!r} is outside {bounds}; pass a value inside that range.")
