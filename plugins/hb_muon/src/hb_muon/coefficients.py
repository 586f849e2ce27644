"""Coefficients of the Newton-Schulz iteration: published tables, one of our own, and the parsing of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from hbcore.api import HyperparameterError

Row: TypeAlias = tuple[float, float, float]
Table: TypeAlias = tuple[Row, ...]
Coefficients: TypeAlias = "str | Sequence[float] | Sequence[Sequence[float]] | None"

JORDAN: Table = ((3.4445, -4.7750, 2.0315),) * 5
"""Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. Maps singular values in [0.002, 1] to [0.68, 1.21]."""

YOU: Table = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""You Jiacheng 2025, as in HeavyBall: a row for each step. Maps [0.002, 1] to [0.85, 1.15]."""


def polar_express(safety: float) -> Table:
    """The table of Amsel et al. 2025, The Polar Express (arXiv:2505.16932), for singular values from 0.001 up.

    Each row is optimal after the rows before it, for singular values up to 1 exactly. Rounding may carry one past that, where
    the polynomials grow without bound: evaluating them at ``x / safety`` keeps it inside. The last row, the classical one
    whose fixed point 1 attracts everything near it, is not scaled.
    """
    return (*((a / safety, b / safety**3, c / safety**5) for a, b, c in _POLAR_EXPRESS), (1.875, -1.25, 0.375))


_POLAR_EXPRESS: Table = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

POLAR_EXPRESS: Table = polar_express(1.01)
"""With the safety factor of the paper's code. Five steps map [0.002, 1] to [0.87, 1.13], seven to 1 within 0.001."""

GRAM: Table = polar_express(1.05)
"""With the larger factor published for :func:`hb_muon.newton_schulz.gram_newton_schulz`, which rounds differently."""

MINIMAX: Table = (
    (6.420167528545524, -16.79477950317157, 11.830500274919176),
    (3.9761588023831598, -3.9895727401947925, 1.0779283948193101),
    (4.033501734336912, -4.073762153002312, 1.1029859510520295),
    (2.4302562633681792, -1.750831529230646, 0.41246069771100513),
    (1.875, -1.25, 0.375),
)
"""Four rows by the method of The Polar Express, and the classical row for a fifth step. Each is optimal on the image of
[0.0035, 1] under the rows before it, with the safety factor 1.01; but the first two are optimal only from 0.06 of the upper end
on: optimal down to the lower end, they would fall to it again near the upper one, where the rounding errors of bfloat16 exceed
the remaining value. Four steps map [0.0036, 1] to [0.80, 1.19]. :func:`hb_muon.minimax.minimax` scales the singular
values of a matrix whose condition number is 100 and whose smaller side is at most 4,000 into [0.0036, 1]."""

TABLES: dict[str, Table] = {"jordan": JORDAN, "you": YOU, "polar_express": POLAR_EXPRESS, "minimax": MINIMAX}
"""The tables by the name that ``ns_coefficients`` takes."""


def table(coefficients: str | Sequence[float] | Sequence[Sequence[float]]) -> Table:
    """Coefficients as rows ``(a, b, c)``.

    Args:
        coefficients: the name of one of :data:`TABLES`, one triple for all steps, or a triple for each step.

    Raises:
        HyperparameterError: it is none of these.
    """
    if isinstance(coefficients, str):
        if coefficients not in TABLES:
            raise HyperparameterError(
                f"ns_coefficients={coefficients!r} does not exist; pass one of {', '.join(TABLES)}, or numbers."
            )
        return TABLES[coefficients]
    rows = tuple(tuple(map(float, row)) if isinstance(row, Sequence) else (float(row),) for row in coefficients)
    if len(rows) == 3 and {len(row) for row in rows} == {1}:
        rows = (tuple(number for row in rows for number in row),)
    if not rows or any(len(row) != 3 for row in rows):
        raise HyperparameterError(f"ns_coefficients={coefficients!r} must be three numbers, or three numbers for each step.")
    return tuple((a, b, c) for a, b, c in rows)


def steps_of(rows: Table, count: int) -> Table:
    """The rows of ``count`` steps: the first ones, the last repeated if there are too few."""
    return rows[:count] + rows[-1:] * (count - len(rows))
