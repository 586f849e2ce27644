"""What ``param_ecc`` keeps beside parameters, in checkpoints: whichever of two runs has it, weights are resumed exactly.

A checkpoint has the corrections, and the fingerprint of the weights that they correct, which are in the model's state dict.
Both may be loaded in either order: a correction waits until it meets those weights, :func:`hbcore.engine.param_codec.settle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hbcore import registry
from hbcore.checkpoint.schema import KEPT, Record
from hbcore.distributed.placement import local
from hbcore.engine.core import OptimizerCore
from hbcore.engine.corrections import FINGERPRINT, PREFIX, Loaded, fingerprint
from hbcore.engine.param_codec import narrow_dtype
from hbcore.errors import CheckpointError, HbcoreError, StateWarning
from hbcore.state.codec import Cast, StateCodec
from hbcore.state.expected import Logical
from hbcore.warn import warn_at_caller

RULE = "param_ecc"
"""The name that the slots beside a parameter go by, in chains and records."""

BEFORE_NAMES = {torch.int8: "bf16+8", torch.int16: "bf16+16"}
"""The codecs that there were when records did not name the parameters' codec, by the dtype of their correction."""


class Reading(Protocol):
    """One param group as it is read, by :class:`hbcore.checkpoint.entries.Reader`."""

    core: OptimizerCore
    g: int
    record: Record | None
    saved: Mapping[str, int]
    strict: bool
    corrections: dict[Tensor, Loaded]

    def tensor(self, i: int, slot: Logical, codec: StateCodec, part: str, value: Any) -> Tensor:
        """A saved tensor of parameter ``i``, where its parameter is."""


def sum_of(core: OptimizerCore, p: Tensor, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The entry that says which weights the corrections in a parameter's entry belong to; empty if there are none."""
    if not any(str(name).startswith(PREFIX) for name in entry):
        return {}
    if core.corrections.waits(p):
        found = core.corrections.waiting[p].sum
    else:
        found = fingerprint(p)
    return {} if found is None else {FINGERPRINT: found}


def read(reader: Reading, i: int, entry: Mapping[str, Any], used: set[Any]) -> dict[str, Tensor]:
    """What a parameter's state has beside it after a load. What has yet to meet its weights goes to ``reader.corrections``.

    Raises:
        CheckpointError: the corrections do not fit, are missing, or their codec is not installed.
    """
    core = reader.core
    param: Tensor = core.groups[reader.g]["params"][i]
    names = [name for name in entry if str(name).startswith(PREFIX)]
    used.update(names)
    ours = core.settings.param_codec
    stores = ours is not None and param.dtype == narrow_dtype(ours)
    if not names:
        if stores and RULE in reader.saved and reader.strict:
            raise CheckpointError(f"{core.name_of(reader.g, i)} has no 'param#ecc' in the checkpoint, which {RULE!r} needs.")
        return {name: t.clone() for name, t in core.state.get(param, {}).items() if stores and name.startswith(PREFIX)}
    codec = _codec(reader, entry)
    dtypes = {name: d for name, d in codec.parts("param", torch.float32).items() if name != "param"}
    if missing := [name for name in dtypes if name not in entry]:
        raise CheckpointError(f"{core.name_of(reader.g, i)} has no {missing[0]!r} in the checkpoint, which {RULE!r} needs.")
    slots = [Logical(RULE, name, param.shape, 0.0, Cast(dtype), False) for name, dtype in dtypes.items()]
    parts = {slot.name: reader.tensor(i, slot, slot.codec, slot.name, entry[slot.name]) for slot in slots}
    total = _fingerprint(reader, i, entry)
    if ours is not None and stores and ours.name == codec.name:
        reader.corrections[param] = Loaded(codec, None, total)
        return parts
    reader.corrections[param] = Loaded(codec, {name: local(t) for name, t in parts.items()}, total)
    if ours is None or not stores:
        return {}
    own = {name: d for name, d in ours.parts("param", torch.float32).items() if name != "param"}
    return {name: torch.zeros_like(param, dtype=d, requires_grad=False) for name, d in own.items()}


def _fingerprint(reader: Reading, i: int, entry: Mapping[str, Any]) -> Tensor | None:
    """The fingerprint of the weights that an entry's corrections belong to; None if it was saved without.

    Raises:
        CheckpointError: it is no tensor of one element.
    """
    who, found = reader.core.name_of(reader.g, i), entry.get(FINGERPRINT)
    if found is None:
        warn_at_caller(
            f"{who} has no {FINGERPRINT!r} in the checkpoint; its corrections are taken to fit the present weights.",
            StateWarning,
        )
        return None
    if not isinstance(found, Tensor) or found.numel() != 1:
        raise CheckpointError(f"{who} has {found!r:.80} for state {FINGERPRINT!r} in the checkpoint; expected one number.")
    return found.detach().clone()


def kept(core: OptimizerCore, param: Tensor, entry: Mapping[Any, Any], used: set[Any]) -> set[str]:
    """The names of the weights to train with in an entry, if they are stored as this optimizer would.

    Others are not looked at: then a switch to training computes the weights, which costs a rounding.
    """
    names = {name for name in entry if isinstance(name, str) and name.startswith(KEPT)}
    used.update(names)
    codec = core.settings.param_codec
    wanted = {"param": param.dtype}
    if codec is not None and param.dtype == narrow_dtype(codec):
        wanted = codec.parts("param", torch.float32)
    found = {name.removeprefix(KEPT): entry[name] for name in names}
    fits = {n: t.dtype for n, t in found.items() if isinstance(t, Tensor) and t.shape == param.shape} == wanted
    return names if fits else set()


def _codec(reader: Reading, entry: Mapping[str, Any]) -> StateCodec:
    """The codec that wrote the corrections of an entry.

    Raises:
        CheckpointError: it is not installed.
    """
    ours = reader.core.settings.param_codec
    name = reader.record.param_codec if reader.record is not None else ""
    correction = entry.get(f"{PREFIX}ecc")
    if not name and isinstance(correction, Tensor):
        name = BEFORE_NAMES.get(correction.dtype, "")
    if ours is not None and name in ("", ours.name):
        return ours
    try:
        codec: StateCodec = registry.load_codec(name)()
    except HbcoreError as error:
        raise CheckpointError(f"param group {reader.g} was saved with param_ecc={name!r}: {error}") from None
    return codec
