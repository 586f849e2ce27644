"""Random numbers of elementwise rules: ``c.noise`` and ``c.probe``, from graph inputs that hold random bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hbcore.engine.graph.program import DRAW, identifier
from hbcore.errors import RuleError
from hbcore.rules.contract import title
from hbcore.rules.noise import normal_of, uniform_of
from hbcore.rules.transform import Domain, Transform


def draw_names(t: Transform) -> tuple[str, ...]:
    """The graph inputs that hold the bits of what ``t`` draws in one update, in the order of its calls."""
    count = 0 if t.domain == Domain.MATRIX else t.draws
    return tuple(f"{DRAW}{identifier(t.name)}.{k}" for k in range(count))


class Draws:
    """``c.noise`` and ``c.probe`` in one call of a rule's ``update``.

    Args:
        t: the rule.
        tensors: the segment's inputs.
        shape: the update's.
    """

    def __init__(self, t: Transform, tensors: Mapping[str, Tensor], shape: torch.Size) -> None:
        self._rule, self._tensors, self._shape = t, tensors, shape
        self._names = iter(draw_names(t))

    def noise(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return uniform_of(self._bits(like, "noise")).to(like.dtype)

    def probe(self, like: Tensor) -> Tensor:
        """Standard normal numbers."""
        return normal_of(self._bits(like, "probe")).to(like.dtype)

    def _bits(self, like: Tensor, what: str) -> Tensor:
        if like.shape != self._shape:
            raise RuleError(
                f"{title(self._rule)} calls c.{what} with shape {tuple(like.shape)}; rules that are not of Domain.MATRIX draw "
                "in the shape of their update."
            )
        name = next(self._names, None)
        if name is None:
            raise RuleError(
                f"{title(self._rule)} calls c.noise and c.probe more often than its draws = {self._rule.draws} says; declare "
                f"`draws = {self._rule.draws + 1}`, or as many calls as one update makes."
            )
        return self._tensors[name]
