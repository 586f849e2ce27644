"""Random numbers for the rows of stacks, millions at once, each from its row's key, the step, the draw and its place alone.

One call of Philox-4x32-10 (:func:`hbcore.rules.noise.philox4x32`) yields four numbers. Its key is the row's, and its counter
consists of the call's index in the row (two words), the step, and which of the step's draws this is: once a row has its key,
nothing is hashed, and nothing is sent to a device. On a GPU one kernel draws them (:mod:`hbcore.rules.noise_kernel`), on a CPU
torch, or generated C++ where the rest of a step is C++.

Bits and uniform numbers are the same on every device. Logarithms, sines and cosines are not: two devices' normal numbers differ
by at most 4e-7, or 4e-7 times their pair's distance from 0 where that is more than 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hbcore.rules.launching import has_triton, pieces
from hbcore.rules.noise import LOW, MULTIPLIERS, ROUNDS, WEYL

CHUNK = 2**17
"""How many calls of Philox are in work at once where there is no kernel: few enough for a cache, and enough for threads."""

UNIT = 2.0**-24
"""The spacing of uniform numbers."""

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]

Philox: TypeAlias = Callable[[Tensor, int, int, int, int, Tensor], Words]
""":func:`words`, or the same in another language."""


def words(keys: Tensor, first: int, count: int, step: int, draw: int, memory: Tensor) -> Words:
    """The words of calls ``first`` to ``first + count`` of each row.

    Args:
        keys: int64 ``[rows]``.
        step, draw: in [0, 2^32).
        memory: int64 ``[5, size]`` for at least so many calls, contiguous; overwritten.

    Returns:
        Four int64 ``[rows, count]`` in [0, 2^32), in ``memory``.
    """
    c0, c1, c2, c3, spare = (m[: len(keys) * count].view(len(keys), count) for m in memory)
    index = torch.arange(first, first + count, device=keys.device)
    c0.copy_(index & LOW)
    c1.copy_(index >> 32)
    c2.fill_(step)
    c3.fill_(draw)
    rounds = torch.arange(ROUNDS, device=keys.device)[:, None, None]
    halves = (keys[:, None], (keys >> 32)[:, None])
    schedule = [(half + rounds * weyl & LOW).unbind() for half, weyl in zip(halves, WEYL, strict=True)]
    a, b = MULTIPLIERS
    for k0, k1 in zip(*schedule, strict=True):
        # The products wrap to the bits of unsigned ones. What c1 and c3 have beyond 32 bits is masked once it is in c0 and c2.
        torch.mul(c2, b, out=spare)
        torch.mul(c0, a, out=c2)
        torch.bitwise_right_shift(spare, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(LOW)
        torch.bitwise_right_shift(c2, 32, out=c1).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(LOW)
        c1, c2, c3, spare = spare, c1, c2, c3
    return c0, c1.bitwise_and_(LOW), c2, c3.bitwise_and_(LOW)


def bits(keys: Tensor, numel: int, step: int, draw: int = 0, philox: Philox = words) -> Tensor:
    """Sixteen random bits for each element of each row.

    Args:
        keys: int64 ``[rows]``, see :func:`hbcore.rules.noise.stream_key`, on any device.
        numel: the elements of a row.
        step, draw: from 0; modulo 2^32.
        philox: what makes the words on a CPU.

    Returns:
        int32 ``[rows, numel]`` in [0, 2^16), on the device of ``keys``.
    """
    return _drawn("bits", keys, numel, step, draw, philox)


def uniform(keys: Tensor, numel: int, step: int, draw: int = 0, philox: Philox = words) -> Tensor:
    """Uniform numbers in [0, 1), float32 ``[rows, numel]``, multiples of 2^-24. The arguments are those of :func:`bits`."""
    return _drawn("uniform", keys, numel, step, draw, philox)


def normal(keys: Tensor, numel: int, step: int, draw: int = 0, philox: Philox = words) -> Tensor:
    r"""Standard normal numbers, float32 ``[rows, numel]``, in pairs, by Box and Muller 1958; the arguments of :func:`bits`.

    .. math:: \pm \sqrt{-2 \ln u} \cos a, \quad \pm \sqrt{-2 \ln u} \sin a, \qquad a = \pi (v - \tfrac12)

    with one sign for both, :math:`u` in (0, 1] of 24 bits, and :math:`v` in (0, 1) of 23; no number is beyond 5.9.
    """
    return _drawn("normal", keys, numel, step, draw, philox)


def _drawn(kind: str, keys: Tensor, numel: int, step: int, draw: int, philox: Philox) -> Tensor:
    dtype = torch.int32 if kind == "bits" else torch.float32
    out = torch.empty(len(keys), numel, dtype=dtype, device=keys.device)
    if out.is_cuda and out.numel() and has_triton():
        from hbcore.rules import noise_kernel  # Triton is slow to import, and not everywhere

        noise_kernel.fill(kind, keys, out, step & LOW, draw & LOW)
    elif out.numel():
        fill(kind, keys, out, step & LOW, draw & LOW, philox if keys.device.type == "cpu" else words)
    return out


def fill(kind: str, keys: Tensor, out: Tensor, step: int, draw: int, philox: Philox = words) -> None:
    """What the kernel does, by torch's operations on a few rows at a time, or on a part of a row.

    Args:
        kind: ``"bits"``, ``"uniform"`` or ``"normal"``.
        keys: int64 ``[rows]``.
        out: ``[rows, numel]``, contiguous, int32 for bits and float32 otherwise; overwritten.
        step, draw: in [0, 2^32).
        philox: what makes the words.
    """
    calls = pieces(out.shape[1], 4)
    size = min(CHUNK, calls * len(keys))
    memory = torch.empty(5, size, dtype=torch.int64, device=out.device)
    some = max(1, size // calls)
    for row in range(0, len(keys), some):
        mine, target = keys[row : row + some], out[row : row + some]
        for first in range(0, calls, min(size, calls)):
            count = min(size, calls - first)
            drawn = philox(mine, first, count, step, draw, memory)
            _put(kind, drawn, target[:, 4 * first : 4 * (first + count)])
    if kind == "uniform":
        out.mul_(UNIT)


def _put(kind: str, drawn: Words, out: Tensor) -> None:
    """Write four numbers for each call, uniform ones as integers. The last of a row may have no place for all."""
    places = [out[:, i::4] for i in range(4)]
    if kind == "normal":
        numbers = [*_pair(drawn[0], drawn[1]), *_pair(drawn[2], drawn[3])]
    else:
        numbers = [word.bitwise_and_(0xFFFF) if kind == "bits" else word.bitwise_right_shift_(8) for word in drawn]
    for place, number in zip(places, numbers, strict=True):
        place.copy_(number[:, : place.shape[1]])


def _pair(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers of two words each. The angle's other half is a sign, because small angles are rounded less."""
    radius = u.bitwise_right_shift_(8).to(torch.float32).add_(0.5).mul_(UNIT).log_().mul_(-2).sqrt_()
    radius = torch.where(v > 0x7FFFFFFF, -radius, radius)
    angle = v.bitwise_and_(0x7FFFFF).to(torch.float32).sub_(2.0**22 - 0.5).mul_(2 * math.pi * UNIT)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)
