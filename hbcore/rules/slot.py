"""What a rule keeps of a parameter from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

STORABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""The dtypes that a slot may ask for."""


@dataclass(frozen=True)
class Slot:
    """One state tensor that a rule keeps per parameter.

    Args:
        shape: the logical shape; the parameter's own for elementwise rules, ``()`` for a scalar.
        fill: the initial value.
        basis: how a change of basis acts on it: ``"rotate"`` (a first moment), ``"permute"`` (a second moment), ``None``.
        exact: store it in the compute dtype regardless of the optimizer's codec: preconditioners, and small numbers.
        scalar: one number for the whole parameter, see :func:`scalar`.
        dtype: store it in this dtype, one of :data:`STORABLE`, whatever the codec and the parameter's dtype. The rule reads it
            in the compute dtype; what it returns is rounded, to bfloat16 stochastically with noise from the optimizer's seed,
            and to nearest otherwise. For rules of ``Domain.MATRIX``.
        derived: it follows from the other slots by :meth:`Transform.derive`. It is not in ``state[p]`` and never saved, and has
            no ``fill``. Otherwise it is a slot like any other, which ``update`` and ``refresh`` keep up to date. Its ``dtype``
            rounds to nearest. For rules of ``Domain.MATRIX``.
        shared: one for all parameters of a flat rule's vector; see :mod:`hbcore.rules.flat`.
        nonnegative: it is never below zero, and a codec may use the sign's bit for something else; second moments are.

    A slot with ``scalar``, ``dtype``, ``derived`` or ``shared`` is ``exact`` too.
    """

    shape: torch.Size
    fill: float = 0.0
    basis: Literal["rotate", "permute"] | None = None
    exact: bool = False
    scalar: bool = False
    dtype: torch.dtype | None = None
    derived: bool = False
    shared: bool = False
    nonnegative: bool = False

    def __post_init__(self) -> None:
        if self.scalar or self.shared or self.dtype is not None or self.derived:
            object.__setattr__(self, "exact", True)
        if self.basis == "permute":
            object.__setattr__(self, "nonnegative", True)


def zeros(param: Tensor, basis: Literal["rotate", "permute"] | None = None) -> Slot:
    """A slot of the parameter's shape that starts at zero."""
    return Slot(param.shape, 0.0, basis)


def scalar(fill: float = 0.0) -> Slot:
    """A slot that is one number for the whole parameter: for rules of ``Domain.TENSOR`` and ``Domain.MODEL``.

    It is a 0-d tensor of the compute dtype on the parameter's device. ``update`` finds it in ``s`` and returns its new value,
    which may depend on reductions, hyperparameters, the step and other scalars; no step waits for it. Each parameter has its
    own, with ``Domain.MODEL`` too, where all are given the same value: a parameter that is added later begins with that value.
    """
    return Slot(torch.Size(()), fill, scalar=True)
