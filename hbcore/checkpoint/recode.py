"""Codecs asked by a checkpoint: to read what they stored, and to write what another one did. Any plugin may have made them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from hbcore.errors import CheckpointError
from hbcore.state.codec import StateCodec
from hbcore.state.codec_choice import part_shape, per_block_of


def read(codec: StateCodec, stored: Mapping[str, Tensor], slot: str, dtype: torch.dtype, who: str) -> Tensor:
    """The logical value of ``slot``, of the shape of its stored tensors, in ``dtype``.

    Args:
        codec: stored it.
        stored: the stored tensors, other slots' perhaps among them.
        slot: its name.
        dtype: the dtype that rules compute in.
        who: the parameter, for messages.

    Raises:
        CheckpointError: the codec raises, or returns something else.
    """
    failed = f"{who} has state {slot!r} that cannot be read by the codec {codec.name!r}"
    per_block = per_block_of(codec, slot)
    shape = stored[next(part for part in codec.parts(slot, dtype) if part in stored and part not in per_block)].shape
    try:
        value = codec.read(stored, slot, dtype)
    except Exception as error:
        raise CheckpointError(f"{failed}: it raised {type(error).__name__}: {error}.") from error
    if value.shape != shape or value.dtype != dtype:
        raise CheckpointError(
            f"{failed}: it returned {value.dtype} of shape {tuple(value.shape)}; expected {dtype} of {tuple(shape)}."
        )
    return value


def write(codec: StateCodec, slot: str, value: Tensor, parts: Mapping[str, torch.dtype], who: str) -> dict[str, Tensor]:
    """The stored tensors of ``slot``, in memory of their own.

    Args:
        codec, slot, who: as in :func:`read`.
        value: the logical value.
        parts: the stored tensors' names and dtypes.

    Raises:
        CheckpointError: the codec raises, or returns something else than its ``parts``, of their shapes.
    """
    failed = f"{who} has state {slot!r} that cannot be written by the codec {codec.name!r}"
    shapes = {name: part_shape(codec, slot, name, value.shape) for name in parts}
    blank = {name: value.new_empty(shapes[name], dtype=d) for name, d in parts.items()}
    try:
        written = codec.write(blank, slot, value)
    except Exception as error:
        raise CheckpointError(f"{failed}: it raised {type(error).__name__}: {error}.") from error
    found = {name: (t.dtype, tuple(t.shape)) for name, t in written.items()}
    wanted = {name: (d, tuple(shapes[name])) for name, d in parts.items()}
    if found != wanted:
        raise CheckpointError(f"{failed}: it returned {found}; expected {wanted}.")
    return {name: t.clone() for name, t in written.items()}


def slot_of(codec: StateCodec, part: str, dtype: torch.dtype, there: Collection[str]) -> str | None:
    """The slot that a stored tensor's name belongs to, if all of that slot's tensors are ``there``; None if there is none.

    A codec tells names of tensors by slots, and not the reverse: those that contain the slot's are tried, the longest first.
    """
    for length in range(len(part), 0, -1):
        for start in range(len(part) - length + 1):
            slot = part[start : start + length]
            parts = codec.parts(slot, dtype)
            if part in parts and all(name in there for name in parts):
                return slot
    return None
