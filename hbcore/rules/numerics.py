"""The few formulas that most rules are written with. Pure, elementwise, any floating dtype."""

from __future__ import annotations

from torch import Tensor

from hbcore.rules.transform import Scalar


def ema(old: Tensor, new: Tensor, beta: Scalar) -> Tensor:
    """Exponential moving average, ``beta * old + (1 - beta) * new``, written so that ``old == new`` returns it exactly."""
    return old + (new - old) * (1 - beta)


def debiased(old: Tensor, new: Tensor, beta: Scalar, step: Tensor) -> tuple[Tensor, Tensor]:
    """The moving average, and the same freed of its bias towards the zero it started from.

    ``m = beta m + (1 - beta) x`` and ``m / (1 - beta^t)``: Kingma and Ba 2015 (arXiv:1412.6980), Algorithm 1.
    """
    average = ema(old, new, beta)
    return average, average / (1 - beta**step)
