"""What a slot says of its shape, and of how it is stored, checked against the rule that declares it."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor

from hbcore.errors import RuleError
from hbcore.rules.declared import kind
from hbcore.rules.domain import Domain
from hbcore.rules.slot import STORABLE, Slot
from hbcore.rules.transform import Transform


def check_slot(t: Transform, where: str, slot: Slot, param: Tensor) -> None:
    """Check one slot of ``t`` for ``param``; messages begin with ``where``.

    Raises:
        RuleError: it has a shape, or a way to be stored, that is not supported.
    """
    shape: Any = slot.shape
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise RuleError(f"{where} has {kind(shape)} for a shape; pass a torch.Size.")
    _check_storage(t, where, slot)
    if slot.scalar and t.domain not in (Domain.TENSOR, Domain.MODEL):
        raise RuleError(
            f"{where} is a scalar, which rules of Domain.TENSOR and Domain.MODEL may have. "
            + ("Use Slot(torch.Size(())): one number for each block." if t.domain == Domain.MATRIX else "Declare one of them.")
        )
    if slot.scalar and tuple(slot.shape):
        raise RuleError(f"{where} is a scalar and has shape {tuple(slot.shape)}; call scalar(fill).")
    if t.domain != Domain.MATRIX and not slot.scalar and tuple(slot.shape) != tuple(param.shape):
        raise RuleError(
            f"{where} has shape {tuple(slot.shape)} for a parameter of shape {tuple(param.shape)}; a slot of a rule that is "
            "not of Domain.MATRIX has its parameter's shape."
        )
    fill: Any = slot.fill
    if not isinstance(fill, (Real, Tensor)) and not hasattr(type(fill), "__torch_function__"):
        raise RuleError(f"{where} has fill {slot.fill!r}; pass a number.")
    if slot.basis not in (None, "rotate", "permute"):
        raise RuleError(f"{where} has basis {slot.basis!r}; pass 'rotate', 'permute' or None.")


def _check_storage(t: Transform, where: str, slot: Slot) -> None:
    """Check what a slot says of how it is stored, and whether it is."""
    asked = [name for name, given in (("dtype", slot.dtype is not None), ("derived", slot.derived)) if given]
    if asked and t.domain != Domain.MATRIX:
        raise RuleError(f"{where} has {asked[0]}={getattr(slot, asked[0])}, which is for rules of Domain.MATRIX.")
    if slot.dtype is not None and slot.dtype not in STORABLE:
        raise RuleError(f"{where} has dtype {slot.dtype!r}; pass one of {', '.join(map(str, STORABLE))}, or None.")
    if slot.derived and type(t).derive is Transform.derive:
        raise RuleError(f"{where} is derived, and the rule does not define derive(s, c), which computes it from the others.")
    if slot.derived and slot.fill:
        raise RuleError(f"{where} is derived and has fill {slot.fill!r}; its first value is what derive(s, c) returns.")
