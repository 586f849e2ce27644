"""A traced segment: plain data for the backends."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from hbcore.engine.graph.host_scalars import Numbers, as_python
from hbcore.rules.transform import Domain
from hbcore.state.blocks import BLOCK


def reduce_sum(x: Tensor, domain: int) -> Tensor:
    """The graph node recorded for ``c.sum``; called directly, it sums one whole tensor."""
    return x.sum()


def reduce_amax(x: Tensor, domain: int) -> Tensor:
    """The graph node recorded for ``c.amax``; called directly, it returns the maximum of one whole tensor."""
    return x.amax()


def identifier(text: str) -> str:
    """``text`` as a name in generated sources: rules are called what their authors like."""
    name = re.sub(r"\W", lambda other: f"_{ord(other[0]):x}_", text)
    return f"_{name}" if name[0].isdigit() else name


def identifiers(names: Iterable[str]) -> dict[str, str]:
    """Each tensor's name as an identifier of its own in generated sources: slots may be called ``a.b`` and ``a_b``."""
    made: dict[str, str] = {}
    for name in names:
        made[name] = name.replace("#", "_").replace(".", "_")
        while list(made.values()).count(made[name]) > 1:
            made[name] += "_"
    return made


REDUCERS: dict[str, Callable[[Tensor, int], Tensor]] = {"sum": reduce_sum, "amax": reduce_amax}


def direct_reduce(x: Tensor, how: str, domain: Domain, rule: str) -> Tensor:
    """The ``reduce`` argument for running a segment untraced on one whole tensor."""
    return REDUCERS[how](x, domain)


NOISE = "noise."
"""Prefix of graph inputs that are random bits: generated from a key and the element's index, never stored.

``noise.<slot>`` are up to 16 bits in int32, for rounding that slot."""

DRAW = f"{NOISE}#"
"""``noise.#<rule>.<k>`` are 64 bits in int64, for what a rule draws k-th in an update. No slot's name has a ``#``."""


class Bits(NamedTuple):
    """Where a random input of an element lies in a word of 32 random bits, which several share: Philox takes a third of the
    time of a step otherwise.

    Attributes:
        word: the first input in that word, whose key the word is drawn by.
        shift: the place of the lowest bit.
        width: the number of bits.
    """

    word: str
    shift: int
    width: int


def shared_words(counts: Mapping[str, int]) -> dict[str, Bits]:
    """Distribute random inputs over words.

    Args:
        counts: input -> its number of bits, at most 16.
    """
    made: dict[str, Bits] = {}
    word, used = "", 32
    for name, count in counts.items():
        if used + count > 32:
            word, used = name, 0
        made[name] = Bits(word, used, count)
        used += count
    return made


def keyed(names: Iterable[str], bits: Mapping[str, Bits]) -> list[str]:
    """Those of a segment's tensors that are random inputs with a key of their own."""
    return [name for name in names if name.startswith(NOISE) and (name not in bits or bits[name].word == name)]


STACK = "stack."
"""Prefix of the tensors a segment writes for the matrix rule after it: ``stack.update``, ``stack.grad``, ``stack.param``."""

CARRIED = "carried."
"""Prefix of numbers that a param group carries from step to step."""

REPORT = "report."
"""Prefix of numbers that a step says of each tensor, for ``report_norms=True``; kept nowhere."""

NONFINITE = "skip_nonfinite_amax0"
"""The reduction of ``skip_nonfinite=True``: above 0 if some gradient of the model holds an inf or a NaN. The first segments
compute it; the segments after a matrix rule are given it."""


def as_scalars(values: Sequence[float | Tensor]) -> Sequence[Tensor]:
    """Numbers as 0-d float64 tensors; tensors are returned unchanged."""
    if any(isinstance(v, Tensor) for v in values):
        return [v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64, device="cpu") for v in values]
    return torch.tensor(values, dtype=torch.float64, device="cpu").unbind()


@dataclass(frozen=True)
class Reduction:
    """A scalar that a phase computes from each tensor and later phases read."""

    name: str
    how: str
    domain: Domain
    dtype: torch.dtype


@dataclass(frozen=True)
class Phase:
    """One pass over the parameters.

    ``graph`` takes ``tensors + scalars + sums`` (and ``numel`` last, if ``needs_numel``) and returns ``writes + reduces``.
    ``sums`` are reductions of earlier phases, and 0-d values that the program is given.
    """

    graph: fx.Graph
    tensors: tuple[str, ...]
    scalars: tuple[int, ...]
    sums: tuple[str, ...]
    needs_numel: bool
    writes: tuple[str, ...]
    reduces: tuple[Reduction, ...]

    @cached_property
    def run(self) -> Callable[..., tuple[Tensor, ...]]:
        """The graph as a function. Made on first use: a backend that generates its own code has no use for Python's."""
        return module_of(self.graph).forward


@dataclass(frozen=True)
class Program:
    """The input of the backends: host scalar arithmetic, then one or more passes over the parameters.

    ``per_block`` are the tensors that have one entry for each block of 32 elements (:mod:`hbcore.state.blocks`), and ``bits``
    says where random inputs for rounding lie in words. ``finish`` computes new values of scalar slots, of carried numbers that
    depend on reductions, and what is reported, once all phases ran; its inputs and results are vectors, an element for each
    parameter.
    """

    label: str
    dtypes: Mapping[str, torch.dtype]
    scalar_names: tuple[str, ...]
    host: fx.GraphModule
    hoisted: tuple[torch.dtype, ...]
    phases: tuple[Phase, ...]
    carries: tuple[str, ...] = ()
    carry: fx.GraphModule | None = None
    finish: Phase | None = None
    per_block: frozenset[str] = frozenset()
    bits: Mapping[str, Bits] = field(default_factory=dict)

    def length(self, name: str, elements: int) -> int:
        """The number of entries of the stored tensor ``name`` for ``elements`` elements of a parameter."""
        return elements // BLOCK if name in self.per_block else elements

    @cached_property
    def keyed(self) -> tuple[str, ...]:
        """The random inputs that have a key of their own: what rules draw, and the first in each word of bits to round with."""
        return tuple(keyed(self.dtypes, self.bits))

    def keys_of(self, phase: Phase) -> list[str]:
        """Those that ``phase`` draws by."""
        random = [name for name in phase.tensors if name.startswith(NOISE)]
        return list(dict.fromkeys(name if name.startswith(DRAW) else self.bits[name].word for name in random))

    def carried(self, values: Sequence[float | Tensor]) -> dict[str, float]:
        """The new values of the group's carried numbers, from the current ones in ``values``."""
        if self.carry is None:
            return {}
        try:
            if self._python_carry is not None:
                return dict(zip(self.carries, self._python_carry(values), strict=True))  # type: ignore[arg-type]
        except (ArithmeticError, ValueError):
            pass  # where Python raises, tensors have inf or nan
        return {name: float(value) for name, value in zip(self.carries, self.carry(*as_scalars(values)), strict=True)}

    def scalars(self, values: Sequence[float | Tensor]) -> tuple[Tensor, ...]:
        """The hoisted scalars as 0-d tensors, from one number or 0-d tensor per entry of :attr:`scalar_names`."""
        if self._python is not None and type(values[-1]) is float:  # the values are either all numbers or possibly all tensors
            try:  # the same result in a tenth of the time
                made = torch.tensor(self._python(values), dtype=torch.float64, device="cpu").unbind()  # type: ignore[arg-type]
                if self._float64:
                    return made
                return tuple(t.to(dtype) for t, dtype in zip(made, self.hoisted, strict=True))
            except (ArithmeticError, ValueError):
                pass  # where Python raises, tensors have inf or nan
        inputs = as_scalars(values)
        with inputs[-1].device:  # where the graph's constants belong, regardless of the user's default device
            result: tuple[Tensor, ...] = self.host(*inputs)
        return result

    def numbers(self, values: Sequence[Any]) -> tuple[float, ...]:
        """The same as plain floats, computed without tensors if possible."""
        try:
            if self._python is not None:
                return self._python(values)
        except (ArithmeticError, ValueError):
            pass  # where Python raises, tensors have inf or nan
        return tuple(float(s) for s in self.scalars(values))

    @cached_property
    def _python_carry(self) -> Numbers | None:
        return None if self.carry is None else as_python(self.carry)

    @cached_property
    def _float64(self) -> bool:
        return all(dtype == torch.float64 for dtype in self.hoisted)

    @cached_property
    def reductions(self) -> tuple[Reduction, ...]:
        """Every reduction, in the order of the phases."""
        return tuple(r for p in self.phases for r in p.reduces)

    @cached_property
    def _python(self) -> Numbers | None:
        return as_python(self.host)


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """The graph as a module. torch keeps each module's source for tracebacks, for ever; this one's is let go."""
    module = fx.GraphModule(torch.nn.Module(), graph)
    name = module.forward.__code__.co_filename
    linecache.cache.pop(name, None)
    sources: dict[str, str] = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
    sources.pop(name, None)
    return module
