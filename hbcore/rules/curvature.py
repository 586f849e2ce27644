"""How a rule has its Hessian-vector products made."""

from __future__ import annotations

from dataclasses import dataclass

from hbcore.rules.checks import check_whole


@dataclass(frozen=True)
class Curvature:
    """How often a rule with ``needs = frozenset({"hvp"})`` is given Hessian-vector products, and how they are made.

    Args:
        interval: the first refresh has one, and every ``interval``-th after it; the others find None in ``c.hvp``.
        finite_differences: run the closure twice, the second time with moved parameters, instead of differentiating twice.
        fallback: where differentiating twice fails, warn and use finite differences from then on; otherwise that is an error.

    Raises:
        HyperparameterError: ``interval`` is not a whole number from 1 on.
    """

    interval: int = 1
    finite_differences: bool = False
    fallback: bool = True

    def __post_init__(self) -> None:
        check_whole("interval", self.interval, 1)


EVERY = Curvature()
"""Exact products, in every refresh."""
