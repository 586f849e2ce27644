"""What all calls of an optimizer's matrix rules share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hbcore.engine.stacks.inner_segment import InnerSegments
from hbcore.rules.products import IEEE, Products, Split


@dataclass(frozen=True)
class Setting:
    """How the rules multiply, and what compiles the rules within them.

    Attributes:
        matmul_precision: the option; None chooses by the device.
        inner: the compiled inner rules.
    """

    matmul_precision: str | None
    inner: InnerSegments

    def products(self, device: torch.device) -> Products:
        """What ``c.products`` is on a device."""
        return Split() if self.matmul_precision == "split" else IEEE
