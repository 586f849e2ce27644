"""Bit patterns of float32, and the ways in which two tensors are the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

INF, MAX = float("inf"), torch.finfo(torch.float32).max


def patterns(bits) -> Tensor:
    """The float32 numbers of these bits."""
    return torch.as_tensor(bits).to(torch.int32).view(torch.float32)


def every_bf16_with_residues() -> Tensor:
    """All 65,536 upper halves, each with the lower halves at which a rounding may change, and random ones."""
    edges = [
        0,
        1,
        0x7F,
        0x80,
        0x81,
        0xFF,
        0x100,
        0x7F7F,
        0x7F80,
        0x7FFF,
        0x8000,
        0x8001,
        0x807F,
        0x8080,
        0xFF7F,
        0xFF80,
        0xFFFF,
    ]
    drawn = torch.randint(0, 2**16, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    upper = torch.arange(2**16, dtype=torch.int64) - 2**15
    return patterns(((upper[:, None] << 16) + torch.tensor(edges + drawn)).ravel())


def any_float32(count: int = 2_000_000, seed: int = 1) -> Tensor:
    """Uniform bits: every exponent is as frequent as any other."""
    return patterns(torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed)))


def all_float32(slices: int = 256) -> Iterator[Tensor]:
    """All 2^32 float32 numbers, in slices."""
    size = 2**32 // slices
    for start in range(-(2**31), 2**31, size):
        yield patterns(torch.arange(start, start + size, dtype=torch.int64))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, of NaN too."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(width), b.view(width))


def every_half(dtype: torch.dtype) -> Tensor:
    """All numbers of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def every_correction(dtype: torch.dtype) -> Tensor:
    """All numbers of an integer dtype."""
    info = torch.iinfo(dtype)
    return torch.arange(info.min, info.max + 1, dtype=torch.int32).to(dtype)
