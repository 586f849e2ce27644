"""Random bits and numbers that depend only on a seed and an element's index, and stochastic rounding.

Elementwise integer arithmetic, so it traces like a rule. Every backend, device and rank draws the same bits for the same
element, and the global generators are never used.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
STRIDE = 0x9E3779B97F4A7C15  # odd, so that no two steps of 2^63 have the same key


def stream_key(name: str, what: str) -> int:
    """A 64-bit key, as a signed integer, for what is drawn for ``name`` for one purpose. The same on every rank."""
    digest = hashlib.blake2b(f"{name}/{what}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def noise_key(stream: int, step: int) -> int:
    """A 63-bit key for one draw, from a :func:`stream_key` and the step: hashing both in every step would take longer than a
    kernel launch, for each parameter."""
    return (stream + step * STRIDE) & (2**63 - 1)


def philox4x32(seed: Tensor | int, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Philox-4x32-10, Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3 (doi:10.1145/2063384.2063405).

    .. math::
        (c_0, c_1, c_2, c_3) \leftarrow
        (\mathrm{hi}(B c_2) \oplus c_1 \oplus k_0,\; \mathrm{lo}(B c_2),\;
        \mathrm{hi}(A c_0) \oplus c_3 \oplus k_1,\; \mathrm{lo}(A c_0))

    for ten rounds, adding the Weyl constants to the keys :math:`k_0, k_1` after each. Counter and key are laid out as in
    Triton's ``tl.randint4x(seed, offset)`` with int64 offsets, and the results are equal bit for bit.

    Args:
        seed: the key, modulo 2^64: a number or an int64 tensor.
        counter: int32 or int64, any shape; each value yields 128 bits.

    Returns:
        Four int64 tensors of ``counter``'s shape with 32 random bits each, in [0, 2^32).
    """
    a, b = MULTIPLIERS
    counter = counter.to(torch.int64)
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    c0, c1 = counter & LOW, (counter >> 32) & LOW
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(ROUNDS):
        (high_a, low_a), (high_b, low_b) = _product(c0, a), _product(c2, b)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def stochastic_round_bf16(x: Tensor, random_bits: Tensor) -> Tensor:
    r"""``x`` (float32) rounded to one of its two bfloat16 neighbours, with expectation ``x`` over the random bits.

    .. math:: \lfloor (\mathrm{bits}(x) + r) / 2^{16} \rfloor, \qquad r \sim U\{0, \dots, 2^{16} - 1\}

    Exact bfloat16 values are unchanged. Finite values beyond the largest bfloat16 round to it, never to inf, which would make
    the expectation infinite. NaN stays NaN.

    Args:
        x: float32, any shape.
        random_bits: integers in [0, 2^16), of ``x``'s shape: half of one of :func:`philox4x32`'s tensors.
    """
    bits = torch.where(torch.isnan(x), 0x7FC00000, x.view(torch.int32))
    # From the largest bfloat16 on, a carry would produce inf; inf and NaN must not be dithered.
    dither = torch.where((bits & 0x7FFFFFFF) < 0x7F7F0000, random_bits.to(torch.int32), 0)
    return ((bits + dither) >> 16).to(torch.int16).view(torch.bfloat16)


def _product(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32-bit product, from two 48-bit products: one 64-bit product would overflow int64."""
    upper, lower = x * (constant >> 16), x * (constant & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & LOW


def words(seed: Tensor | int, counter: Tensor) -> Tensor:
    """The first 64 of :func:`philox4x32`'s bits as one int64, of ``counter``'s shape: what an elementwise rule draws from."""
    high, low, _, _ = philox4x32(seed, counter)
    return (high << 32) | low


def element_words(seed: int, start: int, length: int, device: torch.device) -> Tensor:
    """32 random bits for each of the elements ``start`` to ``start + length`` of a tensor, int64 ``[length]``.

    One of :func:`philox4x32`'s calls serves four neighbours: element ``k`` has word ``k % 4`` of the call with counter
    ``k // 4``.
    """
    first, last = start // 4, -(-(start + length) // 4)
    four = torch.stack(philox4x32(seed, torch.arange(first, last, device=device)), 1).view(-1)
    return four[start - 4 * first :][:length]


def stochastic_round_fp16(x: Tensor, random_bits: Tensor) -> Tensor:
    r"""``x`` (float32) rounded to one of its two float16 neighbours, with expectation ``x`` over the random bits.

    .. math:: \lfloor (\mathrm{bits}(x) + r) / 2^{13} \rfloor 2^{13} \text{ from } 2^{-14} \text{ on}, \qquad
        \lfloor 2^{24} |x| + r 2^{-13} \rfloor 2^{-24} \text{ below}

    Exact float16 values are unchanged, finite values beyond the largest float16, 65504, become it, and NaN stays NaN.

    Args:
        x: float32, any shape.
        random_bits: integers in [0, 2^16), of ``x``'s shape, of which the lowest 13 are used.
    """
    r = random_bits.to(torch.int32) & 0x1FFF
    bits = torch.where(torch.isnan(x), 0x7FC00000, x.view(torch.int32))
    within = torch.where((bits & 0x7FFFFFFF) < 0x7F800000, r, 0)
    normal = ((bits + within) & -0x2000).view(torch.float32)
    small = torch.floor(x.abs() * 2.0**24 + r.to(torch.float32) * 2.0**-13) * 2.0**-24
    small = torch.where(x < 0, -small, small)
    rounded = torch.where(x.abs() < 2.0**-14, small, normal)
    limited = torch.where(x.abs() <= 3.4028234663852886e38, rounded.clamp(-65504.0, 65504.0), x)
    return limited.to(torch.float16)


def uniform_of(drawn: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float32, of the shape of ``drawn``: its upper 24 bits."""
    return ((drawn >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def normal_of(drawn: Tensor) -> Tensor:
    r"""Standard normal numbers, float32, of the shape of ``drawn``: one of Box and Muller's two, 1958.

    .. math:: \sqrt{-2 \ln u_1} \cos 2 \pi u_2 \qquad \cos 2 \pi u = 2 \sin^2 \pi (u - \tfrac12) - 1

    :math:`u_1`, in (0, 1], and :math:`u_2`, in [0, 1), have 24 bits each; no number is beyond 5.9. The sine is its Taylor
    polynomial of degree 13, off by 7e-10 at most: a GPU's own cosine is made for any angle, and spills to memory.
    """
    first = (((drawn >> 40) & 0xFFFFFF).to(torch.float32) + 0.5) * 2.0**-24
    angle = (((drawn >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24 - 0.5) * torch.pi
    square = angle * angle
    sine = 1 - square * (1 / 156)
    for n in (110, 72, 42, 20, 6):  # 10 * 11, 8 * 9, ...
        sine = 1 - square * (1 / n) * sine
    sine = angle * sine
    return (-2 * first.log()).sqrt() * (2 * sine * sine - 1)
