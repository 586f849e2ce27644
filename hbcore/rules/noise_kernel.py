# mypy: disable-error-code="untyped-decorator"
"""The Triton kernel of :mod:`hbcore.rules.row_noise`: four numbers a call of Philox, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hbcore.rules.launching import pieces, run

BLOCK = 512
"""Calls of Philox for each program."""

KINDS = {"bits": 0, "uniform": 1, "normal": 2}


@triton.jit
def pair(u, v):  # type: ignore[no-untyped-def]
    """Two normal numbers of two words.

    The angle, in (-pi / 2, pi / 2), is the nearest multiple of pi / 2, found in integers, and a rest, for which Taylor's
    polynomials are off by 2e-9 at most. A GPU's own sine is made for any angle, and spills to memory.
    """
    radius = tl.sqrt_rn(-2.0 * tl.log(((u >> 8).to(tl.float32) + 0.5) * 5.9604644775390625e-08))
    radius = tl.where((v >> 31) != 0, -radius, radius)
    whole = (v & 0x7FFFFF).to(tl.int32) - 4194304
    quarter = (whole + 2097152) >> 22
    angle = ((whole - (quarter << 22)).to(tl.float32) + 0.5) * 3.7450702829420695e-07  # 2 pi / 2^24
    square = angle * angle
    sine = 1.0 - square * (1.0 / 72) * (1.0 - square * (1.0 / 110))
    sine = 1.0 - square * (1.0 / 20) * (1.0 - square * (1.0 / 42) * sine)
    sine = angle * (1.0 - square * (1.0 / 6) * sine)
    cosine = 1.0 - square * (1.0 / 56) * (1.0 - square * (1.0 / 90))
    cosine = 1.0 - square * (1.0 / 12) * (1.0 - square * (1.0 / 30) * cosine)
    cosine = 1.0 - square * 0.5 * cosine
    sign = quarter.to(tl.float32)  # -1, 0 or 1
    turned = quarter != 0
    return radius * tl.where(turned, -sign * sine, cosine), radius * tl.where(turned, sign * cosine, sine)


@triton.jit(do_not_specialize=("step", "draw", "numel", "calls"))
def noise_kernel(  # type: ignore[no-untyped-def]
    keys, out, step, draw, numel, calls, KIND: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr
):
    """``BLOCK`` of the ``calls`` of one row of ``numel`` numbers; ``WHOLE`` says that these are a multiple of four."""
    across = (calls + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // across).to(tl.int64)
    first = (tl.program_id(0) % across).to(tl.int64) * BLOCK
    index = first + tl.arange(0, BLOCK)
    low = index.to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(
        tl.load(keys + row), low, (index >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero + draw.to(tl.uint32)
    )
    if KIND == 0:
        a, b, c, d = (a & 0xFFFF).to(tl.int32), (b & 0xFFFF).to(tl.int32), (c & 0xFFFF).to(tl.int32), (d & 0xFFFF).to(tl.int32)
    elif KIND == 1:
        a, b = (a >> 8).to(tl.float32) * 5.9604644775390625e-08, (b >> 8).to(tl.float32) * 5.9604644775390625e-08
        c, d = (c >> 8).to(tl.float32) * 5.9604644775390625e-08, (d >> 8).to(tl.float32) * 5.9604644775390625e-08
    else:
        a, b = pair(a, b)
        c, d = pair(c, d)
    length = numel.to(tl.int64)
    if WHOLE:
        length = calls.to(tl.int64) * 4  # a multiple that the compiler sees, so that it writes four at once
    at = first * 4 + tl.arange(0, 4 * BLOCK)
    tl.store(out + row * length + at, tl.interleave(tl.interleave(a, c), tl.interleave(b, d)), mask=at < length)


def fill(kind: str, keys: Tensor, out: Tensor, step: int, draw: int) -> None:
    """As :func:`hbcore.rules.row_noise.fill`, in one launch."""
    rows, numel = out.shape
    calls = pieces(numel, 4)
    grid = (rows * pieces(calls, BLOCK), 1, 1)
    counts = (_signed(step), _signed(draw), numel, calls)
    run(noise_kernel, grid, (keys, out), counts=counts, constants=(KINDS[kind], int(numel % 4 == 0), BLOCK))


def _signed(word: int) -> int:
    """The int32 with the bits of a number in [0, 2^32), so that the argument's type does not depend on it."""
    return word - (word >> 31 << 32)
