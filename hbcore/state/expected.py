"""The state tensors a parameter will have, derived from its chain and codec without taking a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hbcore.rules.flat import with_serial
from hbcore.rules.numerics import compute_dtype
from hbcore.rules.transform import Domain, Slot, Transform
from hbcore.rules.views import Block
from hbcore.state.codec import Cast, StateCodec, part_name
from hbcore.state.codec_choice import codec_of, fitting, part_shape


class Logical(NamedTuple):
    """One slot of a parameter, before a codec splits it into stored tensors.

    Attributes:
        rule: the transform that owns it.
        name: its name; ``slot@k`` for run ``k`` of a parameter that a matrix rule cuts into several.
        shape: its shape; for a matrix rule, that of the run: ``[count, *slot.shape]``, or ``slot.shape`` for a single block.
        matrix: whether a matrix rule owns it; other slots share their parameter's memory layout.
        scalar: whether it is one number for the whole parameter, or what all parameters of a flat rule share.
        derived: whether it is computed from the others, and not part of the state.
        flat: whether a flat rule owns it, and it is the parameter's own: its shape begins with the parameter's.
        kind: the slot as its rule describes it; None for what ``param_ecc`` keeps.
    """

    rule: str
    name: str
    shape: torch.Size
    fill: float
    codec: StateCodec
    matrix: bool
    scalar: bool = False
    derived: bool = False
    flat: bool = False
    kind: Slot | None = None

    def parts(self, param: Tensor) -> dict[str, torch.dtype]:
        """The stored tensors and their dtypes."""
        return self.codec.parts(self.name, compute_dtype(param.dtype))

    def part_shape(self, part: str) -> torch.Size:
        """The shape of one of the stored tensors."""
        return part_shape(self.codec, self.name, part, self.shape)

    def blank(self, param: Tensor) -> dict[str, Tensor]:
        """The stored tensors before the first step, unsharded, on the parameter's device."""
        dtype, device = compute_dtype(param.dtype), param.device
        stored = self.parts(param).items()
        parts = {part: torch.zeros(self.part_shape(part), dtype=d, device=device) for part, d in stored}
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
    codec = fitting(codec, param.shape, by_rows(param))
    for t in chain:
        if t.domain != Domain.MATRIX:
            for n, s in t.slots(param).items():
                shape = s.shape if s.scalar else param.shape
                slots.append(Logical(t.name, n, shape, s.fill, codec_of(n, s, codec), False, s.scalar, kind=s))
            continue
        if t.flat:
            for n, s in with_serial(t, t.slots(param)).items():
                stored_as = codec_of(n, s, fitting(codec, torch.Size()))
                slots.append(Logical(t.name, n, s.shape, s.fill, stored_as, False, s.shared, flat=not s.shared, kind=s))
            continue
        runs = t.blocks(param.shape)
        for k, run in enumerate(runs):
            of_block = t.slots(torch.empty(run.shape, dtype=param.dtype, device="meta"))
            own = [(n, s) for n, s in of_block.items() if derived or not s.derived]
            slots += [_run_slot(t, part_name(n, k, len(runs)), slot, run, codec) for n, slot in own]
    return slots


def _run_slot(t: Transform, name: str, slot: Slot, run: Block, codec: StateCodec) -> Logical:
    shape = slot.shape if run.batch == 1 else torch.Size((run.batch, *slot.shape))
    stored_as = codec_of(name, slot, fitting(codec, slot.shape))
    return Logical(t.name, name, shape, slot.fill, stored_as, True, derived=slot.derived, kind=slot)


def by_rows(param: Tensor) -> bool:
    """Whether a parameter's memory is row by row, and its elements are real numbers."""
    return param.is_contiguous() and not param.is_complex()
