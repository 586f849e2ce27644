"""The state tensors a parameter will have, derived from its chain and codec without taking a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Domain, Slot, Transform
from hbcore.rules.views import Block
from hbcore.state.codec import Cast, StateCodec, codec_of, part_name


class Logical(NamedTuple):
    """One slot of a parameter, before a codec splits it into stored tensors.

    Attributes:
        rule: the transform that owns it.
        name: its name; ``slot@k`` for run ``k`` of a parameter that a matrix rule cuts into several.
        shape: its shape; for a matrix rule, that of the run: ``[count, *slot.shape]``, or ``slot.shape`` for a single block.
        matrix: whether a matrix rule owns it; other slots share their parameter's memory layout.
        scalar: whether it is one number for the whole parameter.
        derived: whether it is computed from the others, and not part of the state.
    """

    rule: str
    name: str
    shape: torch.Size
    fill: float
    codec: StateCodec
    matrix: bool
    scalar: bool = False
    derived: bool = False

    def parts(self, param: Tensor) -> dict[str, torch.dtype]:
        """The stored tensors and their dtypes."""
        return self.codec.parts(self.name, compute_dtype(param.dtype))

    def blank(self, param: Tensor) -> dict[str, Tensor]:
        """The stored tensors before the first step, unsharded, on the parameter's device."""
        dtype, device = compute_dtype(param.dtype), param.device
        parts = {part: torch.zeros(self.shape, dtype=d, device=device) for part, d in self.parts(param).items()}
        if not self.fill:
            return parts
        return self.codec.write(parts, self.name, torch.full(self.shape, self.fill, dtype=dtype, device=device))


def expected(
    chain: Iterable[Transform],
    param: Tensor,
    codec: StateCodec,
    param_codec: StateCodec | None = None,
    derived: bool = False,
) -> list[Logical]:
    """Every slot of ``param`` in chain order, preceded by the extra tensors of ``param_codec``.

    With ``derived``, also those that are not part of the state.
    """
    slots: list[Logical] = []
    if param_codec is not None and param_codec.parts("param", torch.float32)["param"] == param.dtype:
        kept = {n: d for n, d in param_codec.parts("param", torch.float32).items() if n != "param"}
        slots += [Logical("param_ecc", n, param.shape, 0.0, Cast(d), False) for n, d in kept.items()]
    for t in chain:
        if t.domain != Domain.MATRIX:
            for n, s in t.slots(param).items():
                shape = s.shape if s.scalar else param.shape
                slots.append(Logical(t.name, n, shape, s.fill, codec_of(s, codec), False, s.scalar))
            continue
        runs = t.blocks(param.shape)
        for k, run in enumerate(runs):
            of_block = t.slots(torch.empty(run.shape, dtype=param.dtype, device="meta"))
            own = [(n, s) for n, s in of_block.items() if derived or not s.derived]
            slots += [_run_slot(t, part_name(n, k, len(runs)), slot, run, codec) for n, slot in own]
    return slots


def _run_slot(t: Transform, name: str, slot: Slot, run: Block, codec: StateCodec) -> Logical:
    shape = slot.shape if run.batch == 1 else torch.Size((run.batch, *slot.shape))
    return Logical(t.name, name, shape, slot.fill, codec_of(slot, codec), True, derived=slot.derived)
