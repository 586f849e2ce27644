# mypy: disable-error-code="untyped-decorator"
"""Device functions for generated kernels, where Triton's own differ from torch or from Triton's interpreter.

The interpreter truncates float32 to bfloat16 where a GPU rounds, its ``tl.maximum(nan, 1)`` is 1, and its ``libdevice`` raises.
Each function here gives torch's result on both.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl

PI = tl.constexpr(math.pi)
HALF_PI = tl.constexpr(math.pi / 2)
UP, DOWN, HALF_DOWN = tl.constexpr(2.0**64), tl.constexpr(2.0**-64), tl.constexpr(2.0**-32)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
NATIVE = tl.constexpr(not INTERPRETED)


if INTERPRETED:

    @triton.jit
    def to_bf16(x):  # type: ignore[no-untyped-def]
        """float32 -> bfloat16, to nearest even, NaN stays NaN."""
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)

else:

    @triton.jit
    def to_bf16(x):  # type: ignore[no-untyped-def]
        """float32 -> bfloat16, to nearest even, NaN stays NaN."""
        return x.to(tl.bfloat16)


@triton.jit
def maximum(x, y):  # type: ignore[no-untyped-def]
    """torch.maximum: NaN if either is."""
    if NATIVE and x.dtype == tl.float32:
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def minimum(x, y):  # type: ignore[no-untyped-def]
    """torch.minimum: NaN if either is."""
    if NATIVE and x.dtype == tl.float32:
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def sign(x):  # type: ignore[no-untyped-def]
    """torch.sign: -1, 0 or 1; 0 for NaN, as in torch."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def rint(x):  # type: ignore[no-untyped-def]
    """torch.round: to nearest, halves to even. From 2**22 on, float32 has no fractions worth rounding."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)


@triton.jit
def small_float(x):  # type: ignore[no-untyped-def]
    """An integer of up to 16 bits as a float32, by adding it to the digits of 1.5 * 2^23."""
    return (x.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


if INTERPRETED or torch.version.hip:

    @triton.jit
    def quotient(a, b):  # type: ignore[no-untyped-def]
        """a / b, rounded to nearest."""
        return tl.div_rn(a, b)

    @triton.jit
    def quotient_by_root(a, b, floor):  # type: ignore[no-untyped-def]
        """a / b, rounded to nearest."""
        return tl.div_rn(a, b)

    @triton.jit
    def root(x):  # type: ignore[no-untyped-def]
        """The square root, rounded to nearest."""
        return tl.sqrt_rn(x)

    @triton.jit
    def root_above(x, floor):  # type: ignore[no-untyped-def]
        """The square root, rounded to nearest."""
        return tl.sqrt_rn(x)

    @triton.jit
    def rough_root(x):  # type: ignore[no-untyped-def]
        """The square root, off by a few bits."""
        return tl.sqrt(x)

else:

    @triton.jit
    def quotient(a, b):  # type: ignore[no-untyped-def]
        """a / b without a branch: rounded to nearest, but for |a| or results below 2^-100, which may be off by a bit.

        Newton's step on an approximate inverse and one on the quotient, as ``div.rn.f32`` does where no exponent is extreme;
        an extreme one of ``b`` is taken to the middle first.
        """
        s = tl.where(tl.abs(b) > UP, DOWN, tl.where(tl.abs(b) < DOWN, UP, 1.0))
        return middle_quotient(a * s, b * s)

    @triton.jit
    def quotient_by_root(a, b, floor):  # type: ignore[no-untyped-def]
        """:func:`quotient` where b is a square root or ``floor``, the larger one: in the middle already if the floor is."""
        if (floor >= DOWN) & (floor <= UP):
            q = middle_quotient(a, b)
        else:
            q = quotient(a, b)
        return q

    @triton.jit
    def middle_quotient(n, d):  # type: ignore[no-untyped-def]
        """n / d for d between 2^-126 and 2^126, 0, inf or NaN."""
        r0 = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1)
        r = tl.fma(tl.fma(-d, r0, 1.0), r0, r0)
        q = n * r
        q = tl.fma(tl.fma(-d, q, n), r, q)
        return tl.where(q == q, q, n * r0)  # 0, inf and NaN make a NaN above, and what they should beside the inverse

    @triton.jit
    def root(x):  # type: ignore[no-untyped-def]
        """The square root without a branch, rounded to nearest: of tiny numbers from larger ones."""
        tiny = x < DOWN
        z = middle_root(tl.where(tiny, x * UP, x))
        return tl.where(tiny, z * HALF_DOWN, z)

    @triton.jit
    def root_above(x, floor):  # type: ignore[no-untyped-def]
        """:func:`root` where nobody looks at what is below ``floor``: roots of tiny numbers, if it is not tiny itself."""
        if floor >= HALF_DOWN:
            z = middle_root(x)
        else:
            z = root(x)
        return z

    @triton.jit
    def middle_root(w):  # type: ignore[no-untyped-def]
        """The square root of a number from 2^-100 on, 0 or NaN, rounded to nearest: Newton's step, as ``sqrt.rn.f32`` does."""
        y = tl.inline_asm_elementwise("rsqrt.approx.f32 $0, $1;", "=f,f", [w], dtype=tl.float32, is_pure=True, pack=1)
        z = w * y
        z = tl.fma(tl.fma(-z, z, w), 0.5 * y, z)
        own = tl.maximum(w, -tl.abs(y), propagate_nan=tl.PropagateNan.ALL)  # 0 and inf are their own roots
        return tl.where(z == z, z, own)

    @triton.jit
    def rough_root(x):  # type: ignore[no-untyped-def]
        """The square root, off by a few bits; 0 for numbers below 2^-126."""
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def root_code(x, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """:func:`hbcore.state.blocks.root_code`."""
    x = tl.minimum(x, LARGEST * LARGEST * 1.0)  # not NaN where one of them is
    digits = (rough_root(x) + 0.5000000596046448) + 12582912.0  # 1.5 * 2^23: a whole number in the lowest digits
    above = digits - 12582912.0
    return digits.to(tl.int32, bitcast=True) - 0x4B400000 - (x <= tl.fma(above, above, -above)).to(tl.int32)


@triton.jit
def atan_unit(x):  # type: ignore[no-untyped-def]
    """atan on [0, 1], accurate to 2e-9: halve the argument, then use the odd Taylor polynomial of degree 19."""
    half = x / (1.0 + tl.sqrt(1.0 + x * x))
    z = half * half
    s = -1.0 / 19 * z + 1.0 / 17
    s = s * z - 1.0 / 15
    s = s * z + 1.0 / 13
    s = s * z - 1.0 / 11
    s = s * z + 1.0 / 9
    s = s * z - 1.0 / 7
    s = s * z + 1.0 / 5
    s = s * z - 1.0 / 3
    return 2.0 * (half + half * z * s)


@triton.jit
def atan2(y, x):  # type: ignore[no-untyped-def]
    """torch.atan2 without libdevice: quadrants by sign, NaN stays NaN."""
    ax, ay = tl.abs(x), tl.abs(y)
    big, small = tl.where(ax > ay, ax, ay), tl.where(ax > ay, ay, ax)
    both_inf = (small == big) & (big == float("inf"))
    ratio = tl.where(both_inf, 1.0, small / tl.where(big == 0, 1.0, big))
    angle = atan_unit(ratio)
    angle = tl.where(ay > ax, HALF_PI - angle, angle)
    angle = tl.where(x < 0, PI - angle, angle)
    angle = tl.where(y < 0, -angle, angle)
    return tl.where((x != x) | (y != y), x + y, angle)


@triton.jit
def block_amax(x, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest float of every 32; NaN if one of them is."""
    return tl.reduce(tl.reshape(x, [BLOCKS, 32]), 1, maximum)


@triton.jit
def block_max(x, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest integer of every 32."""
    return tl.max(tl.reshape(x, [BLOCKS, 32]), 1)


@triton.jit
def spread(x, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each number 32 times."""
    return tl.reshape(tl.broadcast_to(x[:, None], [BLOCKS, 32]), [BLOCKS * 32])


@triton.jit
def element_words(key, first, CALLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """32 random bits, int32, for each of the ``4 * CALLS`` elements from ``first`` on, a multiple of 4: Philox makes four at
    once. The bits of :func:`hbcore.rules.noise.element_words`."""
    a, b, c, d = tl.randint4x(key, first // 4 + tl.arange(0, CALLS))
    four = tl.join(tl.join(a, c), tl.join(b, d))  # the last join varies fastest: a, b, c, d
    return tl.reshape(four, [4 * CALLS]).to(tl.int32, bitcast=True)


@triton.jit
def total(partials, first, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum ``count`` partial sums in a fixed order, in float64."""
    acc = tl.zeros([BLOCK], tl.float64)
    for j in range(0, count, BLOCK):
        at = j + tl.arange(0, BLOCK)
        acc += tl.load(partials + first + at, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(acc)


@triton.jit
def highest(partials, first, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of ``count`` partial maxima; NaN if one of them is."""
    acc = tl.full([BLOCK], float("-inf"), tl.float64)
    nan = tl.zeros([BLOCK], tl.int32)
    for j in range(0, count, BLOCK):
        at = j + tl.arange(0, BLOCK)
        x = tl.load(partials + first + at, mask=at < count, other=float("-inf")).to(tl.float64)
        acc = tl.where(x > acc, x, acc)
        nan |= (x != x).to(tl.int32)
    return tl.where(tl.max(nan) > 0, float("nan"), tl.max(acc))
