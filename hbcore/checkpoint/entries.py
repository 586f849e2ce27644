"""Read one parameter's state from a checkpoint, slot by slot, converting versions and codecs to the running ones."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hbcore import registry
from hbcore.checkpoint import recode, weights
from hbcore.checkpoint.migrations import Migration, path
from hbcore.checkpoint.schema import Record
from hbcore.checkpoint.spreading import spread, spread_as, spread_slot
from hbcore.distributed.placement import is_dtensor, local, shards_of, share_out
from hbcore.engine.core import OptimizerCore
from hbcore.engine.corrections import Loaded
from hbcore.errors import CheckpointError, HbcoreError, StateWarning
from hbcore.rules.numerics import compute_dtype
from hbcore.state.blocks import block_shape
from hbcore.state.codec import Cast, StateCodec, cast_codec
from hbcore.state.codec_choice import PerSlot, codec_of, per_block_of
from hbcore.state.expected import Logical
from hbcore.warn import warn_at_caller


class Reader:
    """Reads the entries of one param group.

    Args:
        core: the core of the optimizer being loaded.
        g: the group's index.
        record: the checkpoint's record of the group; None if torch wrote the checkpoint.
        theirs: the group as saved.
        strict: reject missing or unexpected entries instead of reinitialising or dropping them.
        composite: whether state that no rule used when it was saved is a composite optimizer's, and to be given back.

    Raises:
        CheckpointError: no migration leads from a saved version to the installed one, or the saved codec is not installed.
    """

    def __init__(
        self,
        core: OptimizerCore,
        g: int,
        record: Record | None,
        theirs: Mapping[str, Any],
        strict: bool,
        composite: bool = False,
    ) -> None:
        self.core, self.g, self.record, self.theirs, self.strict = core, g, record, theirs, strict
        self.own = frozenset(record.own if record is not None and composite else ())
        self.saved = record.rules if record else {}
        self.corrections: dict[Tensor, Loaded] = {}
        installed = {n: v for n, v in core.chain.versions(core.groups[g]).items() if n != weights.RULE}
        known = registry.migrations() if any(self.saved.get(n, v) != v for n, v in installed.items()) else []
        self.migrations: dict[str, list[Migration]] = {
            name: path(name, self.saved.get(name, version), version, known, g) for name, version in installed.items()
        }
        self.codec = self._codec()

    def _codec(self) -> StateCodec:
        """The codec that the slots were saved with."""
        ours = self.core.settings.codec
        if self.record is None or self.record.codec == ours.name:
            return ours if self.record is not None else Cast()
        name = self.record.codec
        try:
            if "=" in name:
                return PerSlot({slot: self._named(one) for slot, one in (entry.split("=") for entry in name.split(","))})
            return self._named(name)
        except HbcoreError as error:
            raise CheckpointError(f"param group {self.g} was saved with the codec {name!r}: {error}") from None

    @staticmethod
    def _named(name: str) -> StateCodec:
        if name == "plain" or name.startswith("cast:"):
            return cast_codec(name.removeprefix("cast:") if ":" in name else "float32")
        codec: StateCodec = registry.load_codec(name)()
        return codec

    def read(self, i: int, entry: Any) -> dict[str, Any]:
        """The state of parameter ``i``; empty if the checkpoint has none, so that it starts from scratch."""
        group = self.core.groups[self.g]
        param = group["params"][i]
        if entry is not None and not isinstance(entry, Mapping):
            raise CheckpointError(f"{self._who(i)} has {entry!r:.80} as state in the checkpoint; expected a dict of tensors.")
        entry = {k: v for k, v in (entry or {}).items() if v is not None}  # torch.optim.SGD's momentum before its first step
        if not entry and self.record is not None and self.strict and param.requires_grad:
            raise CheckpointError(f"{self._who(i)} has no state in the checkpoint; pass strict=False to start it from scratch.")
        if not entry:
            return {}
        for name, value in entry.items():
            if name not in self.own and isinstance(value, Tensor) and not _has_values(value, param):
                raise CheckpointError(
                    f"{self._who(i)} has state {name!r} on the device {value.device}, in the layout {value.layout}, in the "
                    "checkpoint; expected a dense tensor with values."
                )
        used = {"step", *self.own}
        kept = weights.kept(self.core, param, entry, used)
        loaded: dict[str, Any] = {**weights.read(self, i, entry, used)}
        step = self._step(i, entry)
        slots = [slot for slot in self.core.chain.expected(group, param) if slot.rule != weights.RULE]
        for rule in dict.fromkeys(slot.rule for slot in slots):
            mine = [slot for slot in slots if slot.rule == rule]
            values = self._rule(i, rule, mine, entry, step, used)
            loaded.update(values)
        for name, value in entry.items():
            if name in self.own and name not in loaded:
                loaded[name] = self._owned(param, value)
            elif name in kept:
                part = local(param.detach())
                loaded[name] = torch.empty_like(part, dtype=value.dtype, requires_grad=False).copy_(local(value))
            elif name not in used:
                self._unexpected(i, name, value, loaded)
        if loaded or not slots:
            loaded["step"] = torch.tensor(step, dtype=torch.float32, device="cpu")
        return loaded

    def _rule(
        self, i: int, rule: str, slots: list[Logical], entry: Mapping[str, Any], step: float, used: set[str]
    ) -> dict[str, Tensor]:
        """All slots of one rule; empty if the rule is new and the checkpoint has none of them."""
        param = self.core.groups[self.g]["params"][i]
        steps = self.migrations.get(rule, [])
        stored: dict[str, dict[str, Tensor]] = {}
        found, missing = False, []
        for slot in slots:
            codec = self._codec_of(slot, entry)
            parts = codec.parts(slot.name, compute_dtype(param.dtype))
            there = [part for part in parts if part in entry]
            used.update(there)
            if len(there) == len(parts):
                stored[slot.name] = {part: self.tensor(i, slot, codec, part, entry[part]) for part in parts}
            else:
                found = found or bool(there)
                missing += [part for part in parts if part not in entry]
        # a rule that the record does not have is new, and may begin with slots of the one that it replaces
        there_before = rule in self.saved or (stored and self.record is None)
        if missing and not steps and (found or there_before) and self.strict:
            raise CheckpointError(f"{self._who(i)} has no {missing[0]!r} in the checkpoint, which {rule!r} needs.")
        if steps:
            return self._migrated(i, rule, slots, stored, entry, step, used)
        loaded: dict[str, Tensor] = {}
        for slot in slots:
            if slot.name in stored:
                loaded.update(self._recoded(i, slot, self._codec_of(slot, entry), stored[slot.name]))
        return loaded

    def _codec_of(self, slot: Logical, entry: Mapping[str, Any]) -> StateCodec:
        """The codec that a slot was saved with. Exact slots are stored the same way under every codec, once they are exact; a
        blockwise codec stored plainly what has no blocks, and there is nothing per block then."""
        if slot.kind is None:
            return slot.codec
        parts = self.codec.parts(slot.name, torch.float32)
        if slot.kind.exact and len(parts) > 1 and all(part in entry for part in parts):
            return self.codec
        codec = codec_of(slot.name, slot.kind, self.codec)
        return codec if all(part in entry for part in per_block_of(codec, slot.name)) else Cast()

    def _recoded(self, i: int, slot: Logical, before: StateCodec, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A slot as the running codec stores it, with a warning if that differs from how it was saved."""
        param = self.core.groups[self.g]["params"][i]
        after, wanted = slot.codec, slot.parts(param)
        alike = {name: t.dtype for name, t in stored.items()} == wanted
        if alike and before.name == after.name:
            return dict(stored)
        value = recode.read(before, _locals(stored), slot.name, compute_dtype(param.dtype), self._who(i))
        written = recode.write(after, slot.name, value, wanted, self._who(i))
        if alike and all(torch.equal(t, local(stored[name])) for name, t in written.items()):
            return dict(stored)  # float64, which codecs mostly leave alone
        found, target = _listed(t.dtype for t in stored.values()), _listed(wanted.values())
        if alike:
            found, target = f"{found} by the codec {before.name!r}", f"that of {after.name!r}"
        warn_at_caller(
            f"state {slot.name!r} was saved as {found} and is converted to {target}, which this optimizer's storage requires.",
            StateWarning,
        )
        first = next(iter(stored.values()))
        return {name: spread_as(t, first, param, slot.part_shape(name)) for name, t in written.items()}

    def _migrated(
        self, i: int, rule: str, slots: list[Logical], stored: Mapping[str, Mapping[str, Tensor]],
        entry: Mapping[str, Any], step: float, used: set[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        """A rule's slots, migrated to its installed version."""
        param = self.core.groups[self.g]["params"][i]
        dtype, who = compute_dtype(param.dtype), self._who(i)
        values = {
            slot.name: recode.read(self._codec_of(slot, entry), _locals(stored[slot.name]), slot.name, dtype, who)
            for slot in slots
            if slot.name in stored
        }
        claimed = {s.name for s in self.core.chain.expected(self.core.groups[self.g], param) if s.rule != rule}
        tensors = {k: v for k, v in entry.items() if isinstance(v, Tensor) and k not in used}
        for name in dict.fromkeys(recode.slot_of(self.codec, part, dtype, tensors) for part in tensors):
            if name is not None and name not in claimed:  # a slot that only the old version has
                used.update(self.codec.parts(name, dtype))
                values[name] = recode.read(self.codec, _locals(tensors), name, dtype, who)
        for migration in self.migrations[rule]:
            values = migration.convert(dict(values), step, self.theirs)
        loaded: dict[str, Tensor] = {}
        for slot in slots:
            if slot.name not in values:
                raise CheckpointError(f"{self._who(i)}: the migrations of {rule!r} leave it without {slot.name!r}.")
            written = recode.write(slot.codec, slot.name, values[slot.name].to(dtype), slot.parts(param), who)
            loaded.update({name: spread_slot(slot, t, param) for name, t in written.items()})
        return loaded

    def _unexpected(self, i: int, name: Any, value: Any, loaded: dict[str, Any]) -> None:
        """Handle an entry that no rule uses: dropped if its rule left the chain, otherwise rejected."""
        running = self.core.chain.versions(self.core.groups[self.g])
        gone = sorted(rule for rule in self.saved if rule not in running)
        if not self.strict or gone:
            why = f"of {' or '.join(gone)}, which this optimizer does not run," if gone else "which no rule here uses,"
            warn_at_caller(f"state {name!r} {why} is left out.", StateWarning)
        elif self.record is not None or isinstance(value, Tensor):
            raise CheckpointError(
                f"{self._who(i)} has state {name!r} in the checkpoint, which no rule here uses; "
                "pass strict=False to leave it out."
            )
        else:
            loaded[name] = copy.deepcopy(value)

    @staticmethod
    def _owned(param: Tensor, value: Any) -> Any:
        """A composite's entry: a tensor of the parameter's shape lies where the parameter does, others are as saved."""
        if not isinstance(value, Tensor) or value.shape != param.shape or is_dtensor(value) or not _has_values(value, param):
            return copy.deepcopy(value)
        if is_dtensor(param):
            return spread(value, param)
        return torch.empty_like(param.detach(), dtype=value.dtype, requires_grad=False).copy_(value)

    def _step(self, i: int, entry: Mapping[str, Any]) -> float:
        if "step" not in entry:
            if self.record is not None and self.strict:
                raise CheckpointError(f"{self._who(i)} has no 'step' in the checkpoint; pass strict=False to count it as one.")
            return 1.0  # torch.optim.SGD does not count steps; assume it has taken one
        value = entry["step"]
        try:
            number = local(value) if isinstance(value, Tensor) else value
            step = -1.0 if isinstance(number, (str, bytes)) else float(number)
        except (TypeError, ValueError, RuntimeError):
            step = -1.0
        if not 0 <= step < 2**53:
            raise CheckpointError(f"{self._who(i)} has step {value!r:.60} in the checkpoint; expected a count.")
        return step

    def tensor(self, i: int, slot: Logical, codec: StateCodec, part: str, value: Any) -> Tensor:
        """A saved tensor as ``codec`` stored it, moved to the parameter's device, memory order and sharding."""
        param: Tensor = self.core.groups[self.g]["params"][i]
        dtype = codec.parts(slot.name, compute_dtype(param.dtype))[part]
        shape = block_shape(slot.shape) if part in per_block_of(codec, slot.name) else slot.shape
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{self._who(i)} has {value!r:.80} for state {part!r} in the checkpoint; expected a tensor.")
        saved: Tensor = local(value) if value.is_complex() and param.is_complex() else value  # torch keeps complex state
        if shape is not None and not is_dtensor(saved) and _without_ones(saved.shape) == _without_ones(shape):
            saved = saved.reshape(
                shape
            )  # a matrix rule's slot, whose blocks have no dimensions of size 1, may be a segment's now
        if saved.shape != shape:
            raise CheckpointError(
                f"{self._who(i)} has state {part!r} of shape {tuple(saved.shape)} in the checkpoint, and {tuple(shape or ())} "
                "here; load it into the model it was saved from, with the same options."
            )
        if saved.is_complex() or (saved.dtype != dtype and not (saved.is_floating_point() and dtype.is_floating_point)):
            raise CheckpointError(
                f"{self._who(i)} has state {part!r} of {saved.dtype} in the checkpoint, an invalid dtype; the codec "
                f"{codec.name!r} stores {dtype}."
            )
        if is_dtensor(saved):
            return saved.detach().clone()
        shards = shards_of(param)
        if slot.flat and shards is not None:
            return share_out(saved.detach().to(local(param).device), shards)
        if slot.matrix or slot.scalar or slot.flat:
            return saved.detach().to(param.device, copy=True)
        return spread(saved, param)

    def _who(self, i: int) -> str:
        return self.core.name_of(self.g, i)


def _has_values(value: Tensor, param: Tensor) -> bool:
    """Whether a saved tensor is one that state can be copied from."""
    return value.layout is torch.strided and (param.is_meta or not value.is_meta)


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _listed(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype) for dtype in dtypes}))


def _locals(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(t) for name, t in tensors.items()}
