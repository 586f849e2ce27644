"""Bounds of rounding that hold on every processor.

Two evaluations of one formula differ in how a processor rounds: vectorised or not, with fused multiply-adds or without, sums in
another order, square roots that are not always the nearest number. A bound that was read off one processor fails on the next.
These bounds follow from how often something is rounded, and from nothing that was measured.
"""

from __future__ import annotations

import torch

OPERATIONS = 16
"""Rounded operations between a gradient and the update that it makes; a root or a quotient may count as two."""


def unit(dtype: torch.dtype) -> float:
    """How far, relatively, a number may lie from the nearest one of ``dtype``: half of the distance between neighbours."""
    return torch.finfo(dtype).eps / 2


def drift(dtype: torch.dtype, steps: int, condition: float = 2.0) -> float:
    """How far ``steps`` steps in ``dtype`` may end from the exact ones, relative to the norm of the parameter.

    Each step rounds every element of the parameter once, by a unit at most, and the parameter by as much of its norm:
    ``steps`` units. The worst case is not far-fetched: subtracting the same small number again and again rounds the same way
    each time. The updates are off by :data:`OPERATIONS` units of the path that they lead along. Both units are relative to
    lengths along the way, and not to the norm at the end: these are ``condition`` times as long at most.
    """
    return condition * (steps + OPERATIONS) * unit(dtype)


def factors(dtype: torch.dtype, iterations: int = 5) -> float:
    """How far apart two orthogonal factors by Newton-Schulz in ``dtype`` may be, relative to their norm.

    Each iteration rounds four matrices of products and sums, each element by a unit at most and in a direction of its own: the
    errors of the two add up as the root of their number.
    """
    return (2 * 4 * iterations) ** 0.5 * unit(dtype)
