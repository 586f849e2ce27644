"""What every matrix rule of an optimizer works with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from hbcore.engine.stacks.inner_segment import InnerSegments
from hbcore.rules.launching import has_triton
from hbcore.rules.products import IEEE, Products, Split, Triple
from hbcore.rules.row_noise import Philox
from hbcore.rules.split_product import WIDENS

TENSOR_CORES = ((8, 0), (9, 0), (10, 0))
"""Compute capabilities of GPUs whose float16 products are more than ten times as fast as those of float32."""


@lru_cache(maxsize=64)
def splits(device: torch.device) -> bool:
    """Whether ``"split"`` is faster than ``"ieee"`` on a device."""
    return WIDENS and device.type == "cuda" and torch.cuda.get_device_capability(device) in TENSOR_CORES


MEASURED = ((9, 0),)
"""Those on which three bfloat16 parts were seen to be faster than float32's own products."""


@lru_cache(maxsize=64)
def triples(device: torch.device) -> bool:
    """Whether ``"ieee"`` is faster on tensor cores than by torch's products on a device, and Triton can do that."""
    if device.type != "cuda" or torch.version.hip or not has_triton():  # an AMD GPU may have the same capability
        return False
    if torch.cuda.get_device_capability(device) not in MEASURED:
        return False
    try:
        from triton.backends.nvidia.compiler import CUDAOptions

        return "bf16x6" in CUDAOptions().allowed_dot_input_precisions
    except (ImportError, AttributeError, TypeError):  # a Triton that says it otherwise; it may not know the precision
        return False


@dataclass(frozen=True)
class Tools:
    """How the rules multiply and draw, and what compiles the rules within them.

    Attributes:
        matmul_precision: the option; None is ``"split"`` where that is faster, and ``"ieee"`` elsewhere.
        inner: the compiled inner rules.
        philox: what makes random words on a CPU.
    """

    matmul_precision: str | None
    inner: InnerSegments
    philox: Philox

    def products(self, device: torch.device) -> Products:
        """What ``c.products`` is on a device."""
        chosen = self.matmul_precision
        ieee = Triple() if chosen != "tf32" and triples(device) else IEEE
        return Split(ieee) if chosen == "split" or (chosen is None and splits(device)) else ieee
