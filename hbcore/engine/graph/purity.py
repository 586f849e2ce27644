"""Rules are pure: on its first run, one that writes to what it was given is stopped before it does.

Tracing finds such a rule, and names the line. This is for those that are not traced: matrix rules, and rules that cannot be.
It also stops a rule that would fail on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbcore.engine.graph.where import where
from hbcore.errors import RuleError
from hbcore.rules.contract import named, tensors_in
from hbcore.rules.transform import Transform

CLAMPS = (torch.ops.aten.clamp.Tensor, torch.ops.aten.clamp_min.Tensor, torch.ops.aten.clamp_max.Tensor)
"""Of the operations on a tensor and a number, those that want both on one device."""


class Purity(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses calls that write to memory which a rule was given. A rule may write to tensors that it made itself."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._title = "the chain"
        self._given: dict[int, Tensor] = {}  # the tensors are kept: an address is only unique while its memory is in use
        self._lent: dict[int, Tensor] = {}

    def give(self, t: Transform, tensors: Iterable[Any]) -> None:
        """From here on ``t`` runs, which is given ``tensors``."""
        self._title = named(t)
        for tensor in (*tensors_in(t), *tensors):
            self.add(tensor)

    def add(self, tensor: Any) -> None:
        """One more tensor that the rule is given."""
        if isinstance(tensor, Tensor):
            self._given[tensor.untyped_storage().data_ptr()] = tensor

    def lend(self, tensor: Tensor) -> None:
        """One more tensor that the rule is given until :meth:`take_back`: its memory is not to be kept any longer."""
        self._lent[tensor.untyped_storage().data_ptr()] = tensor

    def take_back(self) -> None:
        """The rule has no more use for what it was lent."""
        self._lent.clear()

    @contextmanager
    def within(self, t: Transform, tensor: Tensor) -> Iterator[None]:
        """Within it ``t`` runs, which the rule called with ``tensor``, perhaps one that it made itself."""
        before = self._title, dict(self._given)
        self._title = named(t)
        self.add(tensor)
        try:
            yield
        finally:
            self._title, self._given = before

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within it the engine writes, and compiles, not the rule."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            address = tensor.untyped_storage().data_ptr()
            if address and (address in self._given or address in self._lent):
                raise RuleError(impure(func, self._title))
        if func in CLAMPS and to_a_number(*args, *kwargs.values()):
            raise RuleError(
                f"{where()}: {self._title} clamps to a number that is a tensor ({func}), which fails on a GPU: hyperparameters "
                "are on the CPU; use hbcore.api.at_least, torch.maximum or torch.minimum."
            )
        return func(*args, **kwargs)


def to_a_number(x: Tensor, *bounds: Any) -> bool:
    """Whether a bound is, or was computed from, a hyperparameter: a 0-d float64 tensor beside others."""
    numbers = [b for b in bounds if isinstance(b, Tensor) and b.ndim == 0 and b.dtype == torch.float64]
    return x.ndim > 0 and x.dtype != torch.float64 and bool(numbers)


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call writes to."""
    if func._schema.is_mutable:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
                yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))


def impure(func: Any, title: str) -> str:
    """The message for a rule that writes to what it was given."""
    return (
        f"{where()}: {title} writes to a tensor that it was given ({func}); rules are pure: use the out-of-place form, or "
        "clone the tensor first."
    )
