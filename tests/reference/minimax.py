"""Minimax polynomials and the iteration from the Schatten-8 norm, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from reference.options import Array

Row = tuple[float, float, float]


def quintic(low: float, high: float) -> tuple[Row, float]:
    """The ``(a, b, c)`` whose ``|1 - (a x + b x**3 + c x**5)|`` on ``[low, high]`` is least at its largest, and that error.

    Remez's exchange on a grid (Amsel et al. 2025, arXiv:2505.16932, section 3, for what is optimal): the error takes its
    largest size at four points, with alternating signs, of which two are the ends.
    """
    x = np.linspace(low, high, 200_001)
    points = np.array([low, (3 * low + high) / 4, (low + 3 * high) / 4, high])
    for _ in range(50):
        system = np.stack([points, points**3, points**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        value = a * x + b * x**3 + c * x**5
        inner = slice(1, -1)
        high_point = x[inner][np.argmax(np.where(x[inner] < points[2], value[inner], -np.inf))]
        low_point = x[inner][np.argmin(np.where(x[inner] > high_point, value[inner], np.inf))]
        new = np.array([low, high_point, low_point, high])
        if np.array_equal(new, points):
            break
        points = new
    return (float(a), float(b), float(c)), float(abs(error))


def table(low: float, steps: int, safety: float, cushions: Sequence[float]) -> list[Row]:
    """Rows each optimal for what those before it make of ``[low, 1]``, to be evaluated at ``x / safety``.

    A step with a cushion is optimal from that part of the upper end on, if it would otherwise be so from further below.
    """
    rows, x = [], np.geomspace(low, 1, 400_001)
    for k in range(steps):
        high = float(x.max())
        (a, b, c), _ = quintic(max(float(x.min()), (cushions[k] if k < len(cushions) else 0) * high), high)
        rows.append((a / safety, b / safety**3, c / safety**5))
        x = a * x + b * x**3 + c * x**5
    return rows


def minimax(x: Array, coefficients: Sequence[Row], steps: int) -> Array:
    """``U diag(sigma) V^T``, with ``sigma / (sum sigma**8)**(1/8)`` to begin with, and a polynomial a step."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / max(float(np.sum((s / s[0]) ** 8)) ** (1 / 8) * s[0], 1e-300)
    for k in range(steps):
        a, b, c = coefficients[min(k, len(coefficients) - 1)]
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt
