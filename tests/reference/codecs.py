"""The storage codecs in integers and float64, written from their formulas. No imports from hbcore or its plugins."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def first_24(bits: Array, dither: int | Array = 128) -> tuple[Array, Array]:
    """bf16+8 as it was first written: a guard on integers, two roundings in turn, the correction a difference.

    Args:
        bits: int64, of float32 numbers, signed.
    """
    magnitude = bits & 0x7FFFFFFF
    bits = np.where(magnitude > 0x7F800000, 0x7FC00000, bits)
    b = np.where((bits & 0x7FFFFFFF) < 0x7F7FFF00, bits + dither, bits) >> 8
    hi = (b + 128) >> 8
    return hi, b - (hi << 8)


def pair_24(hi: Array, lo: Array) -> Array:
    """The bits of a pair's float32, as an integer that may be out of the int32 range; a zero has no negative correction."""
    lo = np.where(((hi & 0x7FFF) == 0) & (lo < 0), 0, lo)
    return ((hi << 8) + lo) << 8


def pair_32(hi: Array, lo: Array) -> Array:
    """The same of bf16+16."""
    lo = np.where(((hi & 0x7FFF) == 0) & (lo < 0), 0, lo)
    return (hi << 16) + lo


def half_pair(hi: Array, lo: Array, extra: int) -> Array:
    """What a float16 and a correction stand for, in float64: a mantissa and an exponent, of the magnitude's 15 + extra bits.

    Args:
        hi: float16.
        lo: integers.
        extra: the correction's bits.
    """
    bits = hi.view(np.int16).astype(np.int64)
    code = np.maximum(((bits & 0x7FFF) << extra) + lo, 0)
    exponent, mantissa = code >> (10 + extra), code & ((1 << (10 + extra)) - 1)
    normal = exponent > 0
    mantissa = np.where(normal, mantissa & -(1 << max(0, extra - 13)), mantissa)  # a float32 has 23 bits of it
    whole = np.where(normal, mantissa + (1 << (10 + extra)), mantissa)
    value = np.ldexp(whole.astype(np.float64), np.where(normal, exponent, 1) - 15 - 10 - extra)
    value = np.where(bits < 0, -value, value)
    return np.where(np.isfinite(hi), value, hi.astype(np.float64))


def blocks(x: Array, largest: int, digits: int) -> tuple[Array, Array]:
    """The codes and scales of rows of 32 numbers, in float64: the nearest root in the scale's units, and never 0 unless x is.

    Args:
        x: ``[rows, 32]``.
        largest: the largest code.
        digits: the binary digits of a scale; 24 are rounded to nearest, fewer up.
    """
    x = x.astype(np.float64)
    highest = np.abs(x).max(1)
    scale = np.maximum((highest / largest**2).astype(np.float32).astype(np.float64), 2.0**-114)
    mantissa, exponent = np.frexp(scale)
    scale = np.ldexp(np.ceil(mantissa * 2**digits), exponent - digits)
    ratio = np.abs(x) / scale[:, None]
    code = np.ceil((np.sqrt(1 + 4 * ratio) - 1) / 2)  # n (n - 1) < ratio <= n (n + 1)
    return np.minimum(code, largest) * np.sign(x), np.where(highest == 0, 0, scale)


def values(code: Array, scale: Array) -> Array:
    """What codes and scales stand for, in float64."""
    return code * np.abs(code) * scale[:, None].astype(np.float64)
