"""A matrix rule bound to numbers that each step fills, and which of them it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Number
from types import BuiltinFunctionType, FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor

from hbcore.engine.graph.program import CARRIED
from hbcore.engine.graph.segment_spec import SegmentSpec
from hbcore.rules.palm import RisingDecay
from hbcore.rules.transform import Transform


class BoundRule:
    """One matrix rule of a chain, whose hyperparameters are 0-d views of one small float64 vector on the host.

    A chain that computes with hyperparameters as it is built, rather than in ``update``, has other tensors; it is built again
    each time the vector is filled. Such a rule, and one that was handed a closure or an object of the author's own, may read
    any number of the group.

    Args:
        spec: describes the chain.
        index: the rule's place in it.

    Attributes:
        scalars: the views by name, as in ``spec.scalar_names``.
        rule: the rule.
        carried: what a group carries for it.
        reads: the places, in the vector, of the numbers that it reads: hyperparameters, inner rules' too, and carried ones. The
            step is not among them.
    """

    def __init__(self, spec: SegmentSpec, index: int) -> None:
        self._spec, self._index = spec, index
        self._vector = torch.zeros(len(spec.scalar_names), dtype=torch.float64, device="cpu")
        self.scalars = dict(zip(spec.scalar_names, self._vector.unbind(), strict=True))
        self.rule = self._built()
        self.carried = {name: self.scalars[CARRIED + name] for name in self.rule.scalars()}
        inputs = list(_inputs_of(self.rule))
        known = {id(scalar) for scalar in self.scalars.values()}
        self._follows = all(id(value) in known for value in inputs if isinstance(value, Tensor))
        every = not self._follows or any(map(_may_hold_more, inputs))
        read = {id(value) for value in (*inputs, *self.carried.values())}
        self.reads = tuple(i for i, name in enumerate(spec.numbered) if every or id(self.scalars[name]) in read)

    def fill(self, numbers: Sequence[float], step: float) -> Transform:
        """Write a step's numbers into the vector; return the rule that has them."""
        absent = [1.0] * (len(self.scalars) - len(numbers) - 2)  # a GradScaler's, which matrix rules do not see
        self._vector.copy_(torch.tensor([*numbers, *absent, step, 1.0], dtype=torch.float64, device="cpu"))
        if not self._follows:
            self.rule = self._built()
        return self.rule

    def _built(self) -> Transform:
        return self._spec.whole_chain(self.scalars)[self._index]


def _inputs_of(value: Any) -> Iterator[Any]:
    """Every value that a rule was made of, inner rules' and those of decays that rise too."""
    parts: Iterable[Any]
    if isinstance(value, Transform):
        parts = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, RisingDecay):
        parts = value.inputs
    elif isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        parts = value
    else:
        yield value
        return
    for part in parts:
        yield from _inputs_of(part)


def _may_hold_more(value: Any) -> bool:
    """Whether an input may hold tensors that :func:`_inputs_of` does not see."""
    if isinstance(value, FunctionType):
        return bool(value.__closure__ or value.__defaults__ or value.__kwdefaults__)
    return not isinstance(value, (Tensor, Number, str, type, torch.dtype, torch.device, NoneType, BuiltinFunctionType))
