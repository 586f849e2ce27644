"""The decay of the second moment that rises with the step, as PaLM had it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hbcore.rules.transform import Bounds, Scalar, Transform, check_bounds

SCALE = Bounds(gt=0, le=1)
"""What ``beta2_scale`` may be: above 1 the average would stop following the gradients."""


class RisingDecay:
    r"""The number :math:`\beta_2(t) = 1 - t^{-s}`, Chowdhery et al. 2022 (arXiv:2204.02311), section 5; Shazeer and Stern 2018.

    It stands where a rule has its :math:`\beta_2`, and rules are written as always. The moving average begins with the first
    gradient alone, as :math:`\beta_2(1) = 0`. So it has no bias towards zero, and what a rule would correct that by,
    :math:`1 - \prod_{i \le t} \beta_2(i)`, written ``1 - beta ** step`` for a constant rate, is 1.

    Args:
        step: ``t``, 0-d float64, at least 1.
        scale: ``s``, in (0, 1].
    """

    def __init__(self, step: Scalar, scale: Scalar) -> None:
        self._gap: Any = step**-scale

    def plain(self) -> Any:
        """The number itself."""
        return 1 - self._gap

    def __rsub__(self, other: Any) -> Any:
        return other - 1 + self._gap  # nothing cancels in 1 - beta

    def __pow__(self, step: Any) -> Any:
        return 0 * self._gap

    def __mul__(self, other: Any) -> Any:
        return self.plain() * other

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs or {}))
        return func(*args, **kwargs)


def raised(h: Any, step: Tensor) -> None:
    """Let the second decay rate among a group's hyperparameters ``h``, ``betas[1]`` or ``alpha``, rise; in place."""
    decay = RisingDecay(step, h.beta2_scale)
    if getattr(h, "betas", None) is not None:
        h.betas = (h.betas[0], decay, *h.betas[2:])
    else:
        h.alpha = decay


def check(h: Any, rule: Iterable[Transform]) -> str | None:
    """What is wrong with ``palm=True`` for a rule, or None.

    Raises:
        HyperparameterError: ``beta2_scale`` is outside its bounds.
    """
    check_bounds("beta2_scale", h.beta2_scale, SCALE)
    blank = torch.empty(0, device="meta")
    if any(slot.basis == "permute" for t in rule for slot in t.slots(blank).values()):
        return None
    return "palm=True lets the decay of the second moment rise, and this optimizer has none; pass palm=False."
