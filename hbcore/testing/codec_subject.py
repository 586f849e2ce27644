"""The codec under test, and the values it is tested with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbcore import registry
from hbcore.errors import OptionError
from hbcore.rules.slot import Slot
from hbcore.state.blocks import block_amax

SLOT = "exp_avg"
SHAPES = ((6, 64), (4, 2, 96), (128,))
"""Shapes that a blockwise codec has blocks for."""

Bound = Callable[[Tensor], Tensor]
"""Values, float64 -> how far each of them may be from what is read, of the same shape."""


@dataclass(frozen=True)
class CodecSubject:
    """A codec, and what is known of it.

    Args:
        codec: as the engine uses it for the kind of slot under test.
        signed: whether it stores negative values.
        bound: the error that its author promises, see :data:`Bound`; None if nothing is promised.
    """

    codec: Any
    signed: bool = True
    bound: Bound | None = None

    def __str__(self) -> str:
        return f"{type(self.codec).__name__}({'' if self.signed else 'nonnegative'})"

    def per_block(self) -> frozenset[str]:
        """The parts that have one entry for each block."""
        found = getattr(self.codec, "per_block", None)
        return frozenset() if found is None else frozenset(found(SLOT))

    def values(self, shape: tuple[int, ...], seed: int = 0) -> Tensor:
        """float32 values from about 1e-3 to 1e3, one in nine of them zero."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.exp(2 * torch.randn(shape, generator=generator)) * torch.randn(shape, generator=generator).sign()
        x = torch.where(torch.rand(shape, generator=generator) < 1 / 9, 0.0, x)
        return x if self.signed else x.abs()

    def blank(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Parts full of zeros, as state begins."""
        parts = self.codec.parts(SLOT, dtype)
        blocks = block_amax(torch.zeros(shape)).shape
        return {n: torch.zeros(blocks if n in self.per_block() else shape, dtype=d) for n, d in parts.items()}

    def write(self, value: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """What the codec stores of ``value``."""
        return dict(self.codec.write(self.blank(tuple(value.shape), value.dtype), SLOT, value, noise))

    def read(self, stored: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """What ``stored`` stands for."""
        result: Tensor = self.codec.read(stored, SLOT, dtype)
        return result


def codec_subjects(codec: str | Any, bound: Bound | None = None) -> list[CodecSubject]:
    """What to check of a codec: slots that may be negative, and if it chooses by the slot, those that never are.

    Args:
        codec: a registered name, or a codec.
        bound: see :class:`CodecSubject`; of all of the subjects.

    Raises:
        RegistryError: the name is unknown or ambiguous, or its plugin is broken.
    """
    made = registry.load_codec(codec)() if isinstance(codec, str) else codec
    choose = getattr(made, "of", None)
    if choose is None:
        return [CodecSubject(made, True, bound)]
    found = []
    for signed in (True, False):
        try:
            found.append(CodecSubject(choose(Slot(torch.Size((6, 64)), nonnegative=not signed)), signed, bound))
        except OptionError:  # it stores no such slots
            continue
    return found
