"""Different rules for different parameters of one group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hbcore.errors import RuleError
from hbcore.rules.bounds import Bounds
from hbcore.rules.declared import check_branch
from hbcore.rules.transform import Transform

Predicate = Callable[[Tensor], bool]


def is_matrix(param: Tensor) -> bool:
    """Whether a parameter has at least two dimensions larger than 1."""
    return sum(n > 1 for n in param.shape) > 1


@dataclass(frozen=True)
class Route(Transform):
    """A fork in a chain: parameters for which ``when`` holds go through ``then``, the others through ``otherwise``.

    Never runs itself: :func:`resolve` replaces it with one of its branches before tracing.

    Args:
        when: a module-level predicate on the parameter's shape and dtype.
        then, otherwise: the transforms of each branch.
    """

    when: Predicate
    then: tuple[Transform, ...]
    otherwise: tuple[Transform, ...] = ()
    name = "route"

    def __post_init__(self) -> None:
        check_branch("Route", self.then, Transform)
        check_branch("Route", self.otherwise, Transform)
        if not callable(self.when):
            raise RuleError(
                f"the condition of a Route is {self.when!r}; pass a module-level function of a parameter: is_matrix."
            )
        super().__post_init__()

    def hypers(self) -> Iterator[tuple[str, Any, Bounds]]:
        for t in (*self.then, *self.otherwise):
            yield from t.hypers()


def resolve(chain: Iterable[Transform], branches: Iterable[bool]) -> tuple[Transform, ...]:
    """The chain with each fork replaced by the branch that ``branches`` picks, in order of appearance."""
    picks = iter(branches)

    def walk(transforms: Iterable[Transform]) -> Iterator[Transform]:
        for t in transforms:
            if isinstance(t, Route):
                yield from walk(t.then if next(picks) else t.otherwise)
            else:
                yield t

    return tuple(walk(chain))


def every(chain: Iterable[Transform]) -> Iterator[Transform]:
    """Every transform of every branch, without the forks themselves."""
    for t in chain:
        if isinstance(t, Route):
            yield from every((*t.then, *t.otherwise))
        else:
            yield t


def branches(chain: Iterable[Transform], param: Tensor) -> tuple[bool, ...]:
    """The branch ``param`` takes at each fork it reaches."""
    taken: list[bool] = []
    for t in chain:
        if isinstance(t, Route):
            taken.append(bool(t.when(param)))
            taken += branches(t.then if taken[-1] else t.otherwise, param)
    return tuple(taken)
