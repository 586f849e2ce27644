# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel of :func:`hb_muon.passes.small_factor`: all steps on a small matrix, whose products stay on the chip."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hb_muon.coefficients import Table
from hbcore.api import launching

STEPS = 3
"""The most steps that the kernel takes."""


@triton.jit
def small(  # type: ignore[no-untyped-def]
    out, gram, least, a0, b0, c0, a1, b1, c1, a2, b2, c2, side, STEPS: tl.constexpr, TILE: tl.constexpr
):
    """``STEPS`` steps on matrix ``pid0``, rounded where :func:`hb_muon.newton_schulz.followed` rounds.

    With the bound of :func:`hb_muon.passes.begun` unless ``least`` is negative; one kernel for both is compiled once.
    """
    rows, columns = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    inside = (rows < side) & (columns < side)
    at = tl.program_id(0).to(tl.int64) * side * side + rows * side + columns
    dtype = out.dtype.element_ty
    r = tl.load(gram + at, mask=inside, other=0.0)
    eye = (rows == columns) & inside
    square = tl.dot(r, r).to(dtype).to(tl.float32)
    norm = tl.sqrt(tl.sum(tl.sum(square * square, 1), 0))
    scale = tl.where(least < 0, 1.0, 1 / tl.sqrt(tl.maximum(norm, least)))
    wide = r.to(tl.float32) * scale
    first = b0 * wide + c0 * (square * (scale * scale))
    q = (tl.where(eye, a0 + first, first) * tl.sqrt(scale)).to(dtype)
    r = wide.to(dtype)
    z = first.to(dtype)
    a = a0
    for i in tl.static_range(1, STEPS):
        w = (a * r.to(tl.float32) + tl.dot(r, z)).to(dtype)
        r = (a * w.to(tl.float32) + tl.dot(z, w)).to(dtype)
        b, c = b1, c1
        a = a1
        if i == 2:
            a, b, c = a2, b2, c2
        z = (b * r.to(tl.float32) + c * tl.dot(r, r)).to(dtype)
        q = (a * q.to(tl.float32) + tl.dot(q, z)).to(dtype)
    tl.store(out + at, q, mask=inside)


def launch_small(out: Tensor, gram: Tensor, rows: Table, least: float | None) -> None:
    """Fill ``out`` ``[B, k, k]`` with the factor that the steps of ``rows``, at most :data:`STEPS`, multiply a matrix by.

    ``gram`` is contiguous like ``out``. ``least`` bounds the norm of its square from below if the first step takes the bound.
    """
    side = gram.shape[1]
    steps, tile = len(rows), max(16, launching.power_of_two(side))
    numbers = [number for row in (*rows, *[(0.0, 0.0, 0.0)] * (STEPS - steps)) for number in row]
    first = -1.0 if least is None else least
    grid, warps = (len(gram), 1, 1), 8 if tile == 128 else 4
    launching.run(small, grid, (out, gram), (first, *numbers), (side,), (steps, tile), warps)
