"""Division by denominators that may be zero. Selected per optimizer at construction.

=============  ==============================================  =====================================================
name           ``divide(x, y, eps)``                           used by
=============  ==============================================  =====================================================
``eps_clamp``  ``x / max(y, eps)``                             hbcore's default
``eps_add``    ``x / (y + eps)``                               torch.optim, Optax
``atan2``      ``atan2(x / scale, y) * scale``, no ``eps``     Everett et al. 2024 (arXiv:2407.05872), Adam-atan2
``nan_to_0``   ``x / y``, and 0 where that is not finite       no ``eps``
=============  ==============================================  =====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hbcore.errors import OptionError
from hbcore.rules.bounds import Bounds, check_bounds
from hbcore.rules.numerics import Scalar

Divide = Callable[[Tensor, Tensor, Scalar], Tensor]


def eps_clamp(x: Tensor, y: Tensor, eps: Scalar) -> Tensor:
    """``x / max(y, eps)``."""
    return x / (torch.maximum(y, eps) if isinstance(eps, Tensor) else y.clamp(min=eps))


def eps_add(x: Tensor, y: Tensor, eps: Scalar) -> Tensor:
    """``x / (y + eps)``."""
    return x / (y + eps)


def atan2(x: Tensor, y: Tensor, eps: Scalar, scale: float = 16.0) -> Tensor:
    """``atan2(x / scale, y) * scale``: bounded by ``scale * pi / 2``, close to ``x / y`` when that is far below ``scale``."""
    return torch.atan2(x / scale, y) * scale


def nan_to_0(x: Tensor, y: Tensor, eps: Scalar) -> Tensor:
    """``x / y``, and 0 where the quotient is not finite."""
    quotient = x / y
    return torch.where(torch.isfinite(quotient), quotient, 0.0)


BACKENDS: dict[str, Divide] = {"eps_clamp": eps_clamp, "eps_add": eps_add, "atan2": atan2, "nan_to_0": nan_to_0}
"""Name -> function. Read-only by convention: an optimizer looks up its backend once, at construction."""

DEFAULT = "eps_clamp"

ATAN2_SCALE = Bounds(gt=0)


def resolve(name: str, atan2_scale: float = 16.0) -> Divide:
    """The division function called ``name``.

    Raises:
        OptionError: no backend has that name.
        HyperparameterError: the scale is not above 0: the update would vanish, or change its sign.
    """
    check_bounds("atan2_scale", atan2_scale, ATAN2_SCALE)
    if name not in BACKENDS:
        raise OptionError(f"division_backend={name!r} does not exist; pass one of {', '.join(sorted(BACKENDS))}.")
    return partial(atan2, scale=atan2_scale) if name == "atan2" else BACKENDS[name]
