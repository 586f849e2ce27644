"""The protocol between rules and the engine: :class:`Transform`, :class:`Context` and :class:`Slot`.

A rule is a frozen dataclass with one pure function, ``update(u, s, c)``. It never mutates, never branches on a
hyperparameter and never reduces a tensor itself; it uses ``c.sum``, ``c.mean``, ``c.norm``, ``c.amax`` and ``c.numel`` for
anything that depends on a whole tensor. In return the engine fuses, batches, compiles, compresses, shards and checkpoints it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hbcore.errors import HyperparameterError, RuleError
from hbcore.rules.bounds import Bounds, check_bounds
from hbcore.rules.curvature import EVERY, Curvature
from hbcore.rules.declared import check_class
from hbcore.rules.domain import Domain as Domain
from hbcore.rules.hyper import Role as Role
from hbcore.rules.hyper import hyper as hyper
from hbcore.rules.numerics import Scalar, compute_dtype
from hbcore.rules.products import IEEE, Products
from hbcore.rules.slot import Slot as Slot
from hbcore.rules.slot import scalar as scalar
from hbcore.rules.slot import zeros as zeros
from hbcore.rules.views import Block

State = Mapping[str, Tensor]


def unavailable(*_: Any) -> Any:
    """Placeholder for the entries of :class:`Context` that an engine provides."""
    raise RuleError("c.probe, c.noise and c.apply need an engine that runs the rule.")


def itself(x: Tensor) -> Tensor:
    """``c.total`` where a rule sees all there is."""
    return x


def no_memory(name: str) -> Tensor | None:
    """No value can be written at once."""
    return None


class Context(NamedTuple):
    """Everything a rule may read besides its update and state.

    ``param`` and ``grad`` are in the compute dtype: float32, or float64 for float64 parameters. ``step`` is a 0-d float64
    tensor, this parameter's own count, 1 on its first step. The reductions return 0-d tensors and reduce over one tensor
    (:attr:`Domain.TENSOR`) or over all parameters of the optimizer (:attr:`Domain.MODEL`).

    ``noise(like)`` are uniform numbers in [0, 1), ``probe(like)`` standard normal ones, of ``like``'s shape and dtype, from 24
    random bits each; every call in a step returns others. They are derived from the optimizer's seed, the names of parameter
    and rule, the step and the element's place: uniform numbers are identical on every rank, device and backend, and normal ones
    to within rounding. The global generators are never used. Rules that are not of
    :attr:`Domain.MATRIX` declare in ``draws`` how many times they call the two, and draw in the shape of their update.

    The other fields are for rules of :attr:`Domain.MATRIX`, which see stacks ``[B, *shape]`` of equally shaped blocks:

    * ``param`` and ``grad`` are available if the rule's ``needs`` name them; reading them otherwise is an error.
    * ``refresh``: the expensive part is due this step, see :meth:`Transform.rate`.
    * ``hvp`` and ``vector``, of rules whose ``needs`` name ``"hvp"``: the Hessian of the closure's loss times a standard normal
      vector, and the vector, which are stacks in the working dtype; None in steps without, see :attr:`Transform.curvature`. The
      Hessian is that of all parameters whose rules get products in this step, taken together. Products may be infinite or NaN
      where the gradient is finite.
    * ``total(x)``: a sum over the ranks, ``x`` itself for all but flat rules; see :mod:`hbcore.rules.flat`.
    * ``products``: multiplies matrices at the precision that the user chose with ``matmul_precision``, see
      :mod:`hbcore.rules.products`. Operators of torch multiply in float32, or in TF32 where the user chose that.
    * ``apply(inner, u, s)``: run the elementwise rule ``inner`` on the stack: ``inner.update(u, s, c)``, compiled where
      ``inner`` is a field of the rule and ``s`` the state that the rule was given. Returns its update, and new slot values
      that the rule returns along with its own. Those of a compiled rule are in the state already, and need not be.
    * ``into(name)``: memory for the new value of the slot ``name``, or for ``"update"`` of the update, where it can be written
      at once rather than copied from what the rule returns; else None. It is the present value's memory, which the rule must
      not read after writing to it, and is contiguous, in the compute dtype.
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
    products: Products = IEEE
    into: Callable[[str], Tensor | None] = no_memory
    hvp: Tensor | None = None
    vector: Tensor | None = None
    total: Callable[[Tensor], Tensor] = itself

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over the rule's domain, 0-d."""
        return self.sum(x) / self.numel

    def norm(self, x: Tensor) -> Tensor:
        """The Euclidean norm of ``x`` over the rule's domain, 0-d."""
        return self.sum(x * x).sqrt()


@dataclass(frozen=True, init=False)
class Transform:
    """One pure step of a chain. Subclass it as a frozen dataclass; see :mod:`hbcore.rules.moments` for examples.

    Reductions over rows: declare :attr:`Domain.MATRIX`, return ``matrix_view(shape)`` from ``blocks``, and reduce with torch's
    own ``u.mean(-1)``. A slot may have one number for each row, ``Slot(param.shape[:1], exact=True)``, and is ``[B, m]`` in
    ``update``. Under FSDP2 such a rule runs where the whole matrix is, and its slots are saved and resumed like any others.
    A ``Route`` with ``is_matrix`` gives vectors another rule.

    Class attributes:
        name: a short identifier, unique in a chain; checkpoints record ``version`` under it.
        version: incremented when the meaning of a slot changes; a migration then converts old checkpoints.
        domain: the smallest part of the model that ``update`` must see.
        stage: its position in :data:`hbcore.rules.stages.ORDER`; most rules leave it at ``"rule"``. A rule at ``"after"`` runs
            when the step is applied, by the engine or by a rule that owns the application: ``update`` gets the new parameter
            for ``u`` and the one before the step as ``c.param``, and returns what the parameter becomes.
        owns_apply: ``update`` returns the new parameter rather than a step to subtract; at the stage ``"apply"`` only.
        primes: the first gradient only initialises the state, see :meth:`prime`; it moves no parameter and counts no step.
        draws: how many times one ``update`` calls ``c.noise`` and ``c.probe``, at most; matrix rules need not say.
        flat: a matrix rule sees all parameters of a group as one vector, see :mod:`hbcore.rules.flat`.

    Attributes, which a class may also define as properties of its fields:
        needs: what a matrix rule reads besides the update: a subset of ``{"param", "grad", "hvp"}``. With ``"hvp"``, ``step``
            takes a closure: see :attr:`curvature`.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    domain: ClassVar[Domain] = Domain.ELEMENTWISE
    stage: ClassVar[str] = "rule"
    owns_apply: ClassVar[bool] = False
    primes: ClassVar[bool] = False
    draws: ClassVar[int] = 0
    flat: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # dataclasses have constructors of their own
        raise RuleError(f"rule {type(self).__qualname__} is not a dataclass; decorate the class with @dataclass(frozen=True).")

    def __post_init__(self) -> None:
        for f in fields(self):
            if "hyper" not in f.metadata:
                continue
            value, default = getattr(self, f.name), f.default
            if isinstance(default, tuple):
                if not isinstance(value, (tuple, list)) or len(value) != len(default):
                    raise HyperparameterError(
                        f"{f.name}={value!r} is not {len(default)} numbers; pass a tuple of {len(default)}."
                    )
            elif type(value) in (tuple, list):
                raise HyperparameterError(f"{f.name}={value!r} is a {type(value).__name__}; pass one number.")
        for key, value, bounds in self.hypers():
            for i, number in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
                label = f"{key}[{i}]" if isinstance(value, (tuple, list)) else key
                check_bounds(label, number, bounds)

    def hypers(self) -> Iterator[tuple[str, Any, Bounds]]:
        """Yield ``(field, value, bounds)`` for each field declared with :func:`hyper`, inner transforms included."""
        for f in fields(self):
            value = getattr(self, f.name)
            if "hyper" in f.metadata:
                yield f.name, value, f.metadata["hyper"]
            elif isinstance(value, Transform):
                yield from value.hypers()

    def slots(self, param: Tensor) -> dict[str, Slot]:
        """The rule's state tensors for ``param``, by name; torch's names where torch has the same slot.

        Args:
            param: a tensor of the parameter's shape, or for matrix rules of a block's; only its shape and dtype are to be read.
                The names that an elementwise rule returns do not depend on the shape.

        Names are made of letters, digits, underscores and dots; ``param``, ``grad``, ``update``, ``step`` and ``numel`` are the
        engine's.
        """
        return {}

    def joins(self, param: Tensor, step: Tensor) -> dict[str, Tensor]:
        """Elementwise rules: initial slot values when the rule is added to a parameter after ``step`` steps without it.

        Slots that are not returned start as usual. ``param`` is in the compute dtype, ``step`` 0-d float64.
        """
        return {}

    def scalars(self) -> dict[str, float]:
        """Numbers that a param group carries from step to step (a sum of weights, a largest lr), with their initial values.

        ``update`` receives them in ``s`` by name, 0-d float64, and returns their new values along with the slots. They may
        depend on hyperparameters and on each other, not on ``c.step``. Rules of Domain.MODEL may make them depend on reductions
        too; the host then waits for the device once a step, and a slot made by :func:`scalar` is better.
        """
        return {}

    def rate(self, k: int) -> float:
        """The refresh rate at the group's step ``k`` (1 on its first), in [0, 1].

        ``c.refresh`` is true whenever the running sum of the rates passes an integer: 1 refreshes every step, 1 / f every
        f-th step. The engine keeps the sum, and checkpoints store it.
        """
        return 1.0

    @property
    def needs(self) -> frozenset[str]:
        """Matrix rules: what ``update`` reads besides the update, see the class."""
        return frozenset()

    @property
    def curvature(self) -> Curvature:
        """Rules that need ``"hvp"``: in which refreshes, and how the products are made; by default in all of them, exactly."""
        return EVERY

    @property
    def staggers(self) -> bool:
        """Matrix rules with a :meth:`refresh`: whether each matrix has its turn in another step, each as often as :meth:`rate`
        says, instead of all in one."""
        return False

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        """Matrix rules: how a parameter of ``shape`` is cut into stacks of equal blocks; see :mod:`hbcore.rules.views`."""
        raise NotImplementedError(f"{type(self).__name__} is a matrix rule but does not define blocks(shape)")

    def working_dtype(self, param: Tensor) -> torch.dtype:
        """Matrix rules: the dtype of the stack passed to ``update``; the compute dtype by default."""
        return compute_dtype(param.dtype)

    def prime(self, u: Tensor, s: State, c: Context) -> dict[str, Tensor]:
        """Matrix rules with ``primes``: the state after the first update ``u`` of each block."""
        raise NotImplementedError(f"{type(self).__name__} sets primes but does not define prime(u, s, c)")

    def derive(self, s: State, c: Context) -> dict[str, Tensor]:
        """Matrix rules: every slot that is ``derived``, from the other slots ``s`` of a stack.

        The engine calls it before ``update`` where they are not known: on a parameter's first step, after a load, and whenever
        others may have written to the state. Resuming is exact only if this gives bit for bit what ``update`` and ``refresh``
        returned along with the same ``s``, so let one function compute both. It neither draws nor reads parameter or gradient.

        ``s`` are the values as they are stored. If a result has both derived slots and slots that rounding changes, because of
        their dtype or codec, the engine takes the former from here, and not from the result.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define derive(s, c)")

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the new update and the new value of every slot. Pure: never mutates its arguments.

        Elementwise rules may receive any shape. Matrix rules receive a stack ``[B, *shape]`` of equal blocks and slots of
        shape ``[B, *slot.shape]``, where ``slots`` was called with a tensor of the block's shape. They treat each block
        independently, and slots they do not return keep their values.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define update(u, s, c)")

    def update_stacks(self, stacks: Sequence[tuple[Tensor, State, Context]]) -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
        """Matrix rules: the results of ``update`` for several stacks of different block shapes, in order.

        The engine passes all of a rule's stacks of a step at once, and writes each result before it requests the next. By
        default they are computed one after another. Override this where one operation can process several stacks.
        """
        return (self.update(u, s, c) for u, s, c in stacks)

    def refresh(self, stacks: Sequence[tuple[State, Context]]) -> Iterable[dict[str, Tensor]]:
        """Matrix rules: new slot values for several stacks, after an ``update`` in a step whose :meth:`rate` makes it due.

        A rule that can do its expensive part without the update does it here: the state is what ``update`` left, the matrices
        of all stacks are at hand at once, and where it :attr:`staggers`, they are the rows whose turn it is. As with
        :meth:`update_stacks`, each result is written before the next is requested; slots that are not in it keep their values.
        Once every stack is updated, this is called for all of them. ``c.param``, ``c.grad`` and ``c.apply`` are not available,
        nor is what a group carries: :meth:`update` returns that.
        """
        raise NotImplementedError(f"{type(self).__name__} has no refresh of its own")

    def swap(self, param: Tensor, s: State, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Rules with two sets of weights: the other set's parameter and the slots that change with it. Pure, elementwise.

        Args:
            param: the parameter in the compute dtype.
            s: the rule's slots.
            training: True to return the training weights, False for the evaluation weights.
        """
        raise NotImplementedError(f"{type(self).__name__} has one set of weights")
