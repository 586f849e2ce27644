"""What a traced recipe is: plain data that the backends read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hbcore.rules.transform import Domain


def reduce_sum(x: Tensor, domain: int) -> Tensor:
    """The reduction node ``c.sum`` leaves in a graph; called directly, it sums one whole tensor."""
    return x.sum()


def reduce_amax(x: Tensor, domain: int) -> Tensor:
    """The reduction node ``c.amax`` leaves in a graph; called directly, it is one whole tensor's maximum."""
    return x.amax()


REDUCERS: dict[str, Callable[[Tensor, int], Tensor]] = {"sum": reduce_sum, "amax": reduce_amax}


def direct_reduce(x: Tensor, how: str, domain: Domain, rule: str) -> Tensor:
    """``reduce`` for calling a recipe without tracing it, on one whole tensor."""
    return REDUCERS[how](x, domain)


@dataclass(frozen=True)
class Reduction:
    """One number that a phase makes of each tensor, and that later phases read."""

    name: str
    how: str
    domain: Domain
    dtype: torch.dtype


@dataclass(frozen=True)
class Phase:
    """One pass over the parameters.

    ``graph`` takes ``tensors + scalars + sums`` (and ``numel`` last, if ``needs_numel``) and returns ``writes + reduces``.
    """

    graph: fx.GraphModule
    tensors: tuple[str, ...]
    scalars: tuple[int, ...]
    sums: tuple[str, ...]
    needs_numel: bool
    writes: tuple[str, ...]
    reduces: tuple[Reduction, ...]


@dataclass(frozen=True)
class Program:
    """What the backends run: the host's scalar arithmetic, then one or more passes over the parameters."""

    label: str
    dtypes: Mapping[str, torch.dtype]
    scalar_names: tuple[str, ...]
    host: fx.GraphModule
    hoisted: tuple[torch.dtype, ...]
    phases: tuple[Phase, ...]

    def scalars(self, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The hoisted scalars, 0-d, from one 0-d float64 tensor for each of :attr:`scalar_names`."""
        result: tuple[Tensor, ...] = self.host(*values)
        return result
