"""The limits of the machine, measured in the same run as the figures that are compared with them."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from hbcore.cli.bench.measure import Stopwatch

MIB = 1 << 20


def measure_ceilings(device: torch.device, *, quick: bool, windows: int = 6) -> dict[str, Any]:
    """Copy bandwidth and matmul rate.

    Returns:
        ``copy_bytes_per_second`` counts bytes read plus bytes written; ``matmul_flops_per_second`` counts a multiplication
        and an addition as two. Both are medians over windows; the windows are included, in ms per copy or product.
    """
    watch = Stopwatch(device)
    copy_bytes, copy_ms = _copy(device, watch, quick, windows)
    dtype, size, matmul_ms = _matmul(device, watch, quick, windows)
    return {
        "copy_bytes_per_second": 2 * copy_bytes / statistics.median(copy_ms) * 1e3,
        "copy_buffer_bytes": copy_bytes,
        "copy_windows_ms": copy_ms,
        "matmul_flops_per_second": 2 * size**3 / statistics.median(matmul_ms) * 1e3,
        "matmul_dtype": str(dtype).removeprefix("torch."),
        "matmul_size": size,
        "matmul_windows_ms": matmul_ms,
    }


def _copy(device: torch.device, watch: Stopwatch, quick: bool, windows: int) -> tuple[int, list[float]]:
    """Copy a buffer that is larger than any cache."""
    size = (32 if quick else 2048 if device.type == "cuda" else 256) * MIB
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    watch.window(lambda: target.copy_(source), 2)  # exclude the first touch of new pages
    return size, [watch.window(lambda: target.copy_(source), 2 if quick else 10) for _ in range(windows)]


def _matmul(device: torch.device, watch: Stopwatch, quick: bool, windows: int) -> tuple[torch.dtype, int, list[float]]:
    """Multiply square matrices: in bfloat16 on a GPU, as matrix methods do there, in float32 elsewhere."""
    cuda = device.type == "cuda"
    dtype, size = (torch.bfloat16 if cuda else torch.float32), 512 if quick else 8192 if cuda else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    watch.window(lambda: torch.mm(a, b, out=out), 2)
    return dtype, size, [watch.window(lambda: torch.mm(a, b, out=out), 10 if cuda else 1) for _ in range(windows)]
