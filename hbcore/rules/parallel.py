"""Chains run in parallel on one update and merged into one, for grafting and mixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore.errors import RuleError
from hbcore.rules.bounds import Bounds
from hbcore.rules.contract import pair
from hbcore.rules.curvature import Curvature
from hbcore.rules.declared import check_branch
from hbcore.rules.route import Route
from hbcore.rules.transform import Context, Domain, Slot, State, Transform, no_memory
from hbcore.rules.views import Block

Merge = Callable[[Sequence[Tensor], Context], Tensor]
"""The branches' updates and the context -> one update. Pure, like a rule's ``update``."""


def graft(updates: Sequence[Tensor], c: Context) -> Tensor:
    r"""The norm of the first update in the direction of the second, Agarwal et al. 2020 (arXiv:2002.11803).

    .. math:: u = \frac{\lVert u_1 \rVert}{\lVert u_2 \rVert} u_2 \qquad \text{per tensor; zero where } u_2 = 0
    """
    size, direction = updates
    norm = c.norm(direction)
    return direction * (c.norm(size) / norm.clamp(min=torch.finfo(norm.dtype).tiny))


@dataclass(frozen=True)
class Parallel(Transform):
    """Run each branch on the same update and merge the results.

    ::

        def chain(h):
            return (Parallel(((ScaleByAdam(h.betas, h.eps),), (ScaleByLion(h.betas),)), merge=graft),)

    A branch's slot ``x`` is stored as ``branch0.x``. Elementwise branches share one kernel. If a branch contains a matrix rule,
    the whole transform runs as one: elementwise rules in any branch then see the stack.

    Args:
        branches: chains of transforms; an empty one passes the update through.
        merge: a module-level function of the updates, in order, and the context: :func:`graft`, or your own. It may reduce
            over the tensor.

    Raises:
        RuleError: fewer than two branches, more than one matrix rule, or a rule that is not allowed in a branch.
    """

    branches: tuple[tuple[Transform, ...], ...]
    merge: Merge = graft
    name = "parallel"
    domain = Domain.TENSOR

    def __post_init__(self) -> None:
        check_branch("Parallel", self.branches, object)
        for branch in self.branches:
            check_branch("Parallel", branch, Transform)
        super().__post_init__()
        inner = [t for _, t in self._inner()]
        if len(self.branches) < 2:
            raise RuleError(f"Parallel has {len(self.branches)} branches; it takes two or more.")
        if unfit := [t.name for t in inner if isinstance(t, Route) or t.domain == Domain.MODEL or t.stage != self.stage]:
            raise RuleError(
                f"Parallel: {', '.join(unfit)} cannot be in a branch, which takes rules of the stage 'rule' whose domain is at "
                "most one tensor; put a Route around Parallel, and pass clips as options."
            )
        if unfit := [t.name for t in inner if t.owns_apply or t.primes or t.flat]:
            raise RuleError(
                f"Parallel: {', '.join(unfit)} cannot be in a branch: it applies its update itself, primes, or is flat."
            )
        if sum(t.domain == Domain.MATRIX for t in inner) > 1:
            raise RuleError("Parallel takes one matrix rule, in one of its branches; two would see the parameter differently.")
        object.__setattr__(self, "draws", sum(t.draws for t in inner))
        if self._matrix is not None:
            object.__setattr__(self, "domain", Domain.MATRIX)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset[str]().union(*(t.needs for _, t in self._inner())) if self._matrix is not None else frozenset()

    @property
    def curvature(self) -> Curvature:
        return self._matrix.curvature if self._matrix is not None else super().curvature

    @property
    def _matrix(self) -> Transform | None:
        return next((t for _, t in self._inner() if t.domain == Domain.MATRIX), None)

    def _inner(self) -> Iterator[tuple[str, Transform]]:
        """Every transform and the prefix of its slots."""
        for i, branch in enumerate(self.branches):
            for t in branch:
                yield f"branch{i}.", t

    def hypers(self) -> Iterator[tuple[str, Any, Bounds]]:
        for _, t in self._inner():
            yield from t.hypers()

    def slots(self, param: Tensor) -> dict[str, Slot]:
        return {prefix + name: slot for prefix, t in self._inner() for name, slot in t.slots(param).items()}

    def scalars(self) -> dict[str, float]:
        return {prefix + name: first for prefix, t in self._inner() for name, first in t.scalars().items()}

    def rate(self, k: int) -> float:
        return self._matrix.rate(k) if self._matrix is not None else 1.0

    def blocks(self, shape: torch.Size) -> tuple[Block, ...]:
        return self._matrix.blocks(shape) if self._matrix is not None else super().blocks(shape)

    def derive(self, s: State, c: Context) -> dict[str, Tensor]:
        for prefix, t in self._inner():
            if t.domain == Domain.MATRIX:
                return {prefix + name: value for name, value in t.derive(Prefixed(s, prefix), c).items()}
        return super().derive(s, c)

    @property
    def staggers(self) -> bool:
        return self._matrix is not None and self._matrix.staggers

    def working_dtype(self, param: Tensor) -> torch.dtype:
        return super().working_dtype(param) if self._matrix is None else self._matrix.working_dtype(param)

    def refresh(self, stacks: Sequence[tuple[State, Context]]) -> Iterator[dict[str, Tensor]]:
        for prefix, t in self._inner():
            if t.domain == Domain.MATRIX and type(t).refresh is not Transform.refresh:
                for new in t.refresh([(Prefixed(s, prefix), c) for s, c in stacks]):
                    yield {prefix + name: value for name, value in new.items()}
                return
        yield from ({} for _ in stacks)

    def update(self, u: Tensor, s: State, c: Context) -> tuple[Tensor, dict[str, Tensor]]:
        updates, new = [u] * len(self.branches), dict[str, Tensor]()
        c = c._replace(into=no_memory)  # what one branch writes over, another may read
        for i, branch in enumerate(self.branches):
            for t in branch:
                state, stacked = Prefixed(s, f"branch{i}."), self.domain == Domain.MATRIX and t.domain != Domain.MATRIX
                updates[i], changed = c.apply(t, updates[i], state) if stacked else pair(t, t.update(updates[i], state, c))
                new.update({f"branch{i}.{name}": value for name, value in changed.items()})
        return self.merge(updates, c), new


class Prefixed(Mapping[str, Tensor]):
    """One branch's slots, without the branch's prefix."""

    def __init__(self, state: State, prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._state if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
