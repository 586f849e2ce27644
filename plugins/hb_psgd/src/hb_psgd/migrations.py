"""Conversions of state that older versions of the rules saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hbcore.api import Migration


def with_products(slots: dict[str, Tensor], step: float, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The slots with the factors of :math:`P = Q^T Q`, which version 1 of the rule did not keep."""
    dense = {name.removeprefix("Q_"): q for name, q in slots.items() if name.startswith("Q_") and q.ndim == 2}
    return slots | {f"P_{i}": q.mT @ q for i, q in dense.items()}


MIGRATIONS: list[object] = [Migration("psgd_kron", 1, with_products)]
"""What the plugin's ``hb_migrations`` returns."""
