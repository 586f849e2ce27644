"""State changes its codec on the way through a checkpoint: whatever a codec calls its tensors, and whatever dtype they have."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from core.kit import gradients, parameters, run, same
from distributed import jobs
from distributed.ranks import on_ranks

import hbcore
from hbcore import CheckpointError, StateWarning, registry
from hbcore.state.codec import Cast, StateCodec


class Log8:
    """A sign and the logarithm of the magnitude in one byte; zero is zero. float64 is stored like any other."""

    name = "log8"
    rounds = False
    dtype = torch.int8
    per_octave = 2

    def part(self, slot):
        return f"log of {slot}"

    def parts(self, slot, dtype):
        return {self.part(slot): self.dtype}

    def read(self, stored, slot, dtype):
        code = stored[self.part(slot)].to(torch.int8).to(dtype)
        return torch.where(code == 0, 0.0, code.sign() * torch.exp2(code.abs() / self.per_octave - 40))

    def write(self, stored, slot, value, noise=None):
        size = value.abs()
        code = ((size.clamp(min=1e-30).log2() + 40) * self.per_octave).round().clamp(1, 127)
        return {self.part(slot): torch.where(size == 0, 0.0, code * value.sign()).to(torch.int8).to(self.dtype)}


class OwnName8(Log8):
    """The same under the slot's own name."""

    name = "own8"

    def part(self, slot):
        return slot


class Coarse8(OwnName8):
    """Another meaning of the same bytes under the same name; none of the values of the other is halfway between two of it."""

    name = "coarse8"
    per_octave = math.sqrt(2)


class TwoParts(Log8):
    """A float32 and an integer that belongs to it, neither with the slot's name."""

    name = "two"

    def parts(self, slot, dtype):
        return {f"half.{slot}": torch.float32, f"{slot}/shift": torch.int16}

    def read(self, stored, slot, dtype):
        return (stored[f"half.{slot}"] * 2.0 + stored[f"{slot}/shift"]).to(dtype)

    def write(self, stored, slot, value, noise=None):
        shift = value.round().clamp(-99, 99)
        return {f"half.{slot}": ((value - shift) / 2).float(), f"{slot}/shift": shift.to(torch.int16)}


CODECS = {cls.name: cls for cls in (Log8, OwnName8, Coarse8, TwoParts)}
WAYS = [None, *CODECS, "bf16+8"]
PAIRS = [(a, b) for a in WAYS for b in WAYS if a != b]
FEW = [("log8", None), (None, "own8"), ("own8", "coarse8"), ("two", "bf16+8"), ("bf16+8", "log8")]
OPTIMIZERS = {
    "AdamW": {"weight_decay": 0.1},
    "SGD": {"mars": True},
    "Muon": {"ns_dtype": "float32"},
    "SOAP": {},
    "PSGDKron": {},
}


def install(setter):
    """Let the registry find the codecs above."""
    found = registry.load_codec
    setter(registry, "load_codec", lambda name: CODECS[name] if name in CODECS else found(name))


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    install(monkeypatch.setattr)


def codec(name):
    return Cast() if name is None else registry.load_codec(name)()


def build(name, params, ecc, **options):
    return hbcore.get(name)(params, lr=0.02, compile="eager", **OPTIMIZERS[name], **({"ecc": ecc} if ecc else {}), **options)


def trained(name, ecc, dtype=torch.float32):
    params = parameters(dtype=dtype)
    optimizer = build(name, params, ecc)
    run(optimizer, params, gradients(3, dtype=dtype))
    return params, optimizer


def values(optimizer):
    """Each parameter's logical slots, read by the codec that stores them."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            expected = optimizer.core.chain.expected(group, p)
            found.append({s.name: (s.codec.read(optimizer.state[p], s.name, torch.float32), s.codec) for s in expected})
    return found


def stored_as(value, before, after, slot):
    """What a slot is after it was written by another codec."""
    if isinstance(before, Cast) and isinstance(after, Cast):
        return value
    blank = {part: torch.empty_like(value, dtype=dtype) for part, dtype in after.parts(slot, torch.float32).items()}
    return after.read(after.write(blank, slot, value), slot, torch.float32)


def test_they_are_codecs():
    assert all(isinstance(cls(), StateCodec) for cls in CODECS.values())


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("before", "after", "name"), [(*ways, name) for name in OPTIMIZERS for ways in (PAIRS if name == "AdamW" else FEW)]
)
def test_values_are_read_by_the_one_and_written_by_the_other(before, after, name, strict):
    params, optimizer = trained(name, before)
    saved = copy.deepcopy(optimizer.state_dict())
    other = build(name, params, after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_state_dict(saved, strict=strict)
    said = [str(w.message) for w in caught if issubclass(w.category, StateWarning)]
    assert said and all("is converted to" in text for text in said)
    for ours, theirs in zip(values(other), values(optimizer), strict=True):
        assert list(ours) == list(theirs)
        for slot, (value, codec_of) in ours.items():
            assert torch.equal(value, stored_as(theirs[slot][0], theirs[slot][1], codec_of, slot)), slot
    expected = {
        part for g in other.param_groups for p in g["params"] for s in other.core.chain.expected(g, p) for part in s.parts(p)
    }
    assert {key for state in other.state.values() for key in state} == {*expected, "step"}
    run(other, params, gradients(2))
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("ecc", [*CODECS, "bf16+8"])
def test_the_same_codec_resumes_exactly_without_a_warning(ecc, name):
    params, optimizer = trained(name, ecc)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = build(name, copies, ecc)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StateWarning)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for opt, mine in ((optimizer, params), (other, copies)):
        run(opt, mine, list(gradients(5))[3:])
    assert same(copies, params)


def test_float64_converts_too():
    params, optimizer = trained("AdamW", "own8", torch.float64)
    other = build("AdamW", params, None)
    with pytest.warns(StateWarning):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in params:
        assert other.state[p]["exp_avg"].dtype == torch.float64
        assert torch.equal(other.state[p]["exp_avg"], OwnName8().read(optimizer.state[p], "exp_avg", torch.float64))


class Raises(OwnName8):
    name = "raises"

    def read(self, stored, slot, dtype):
        raise KeyError("another slot")


class WrongShape(OwnName8):
    name = "wrong_shape"

    def read(self, stored, slot, dtype):
        return super().read(stored, slot, dtype).flatten()


class Forgets(TwoParts):
    name = "forgets"

    def write(self, stored, slot, value, noise=None):
        return {f"half.{slot}": value.float()}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (Raises, None, r"'exp_avg' that cannot be read by the codec 'raises'.*KeyError.*another slot"),
        (WrongShape, None, r"'exp_avg' that cannot be read by the codec 'wrong_shape'.*\(24,\).*\(6, 4\)"),
        (None, Forgets, r"'exp_avg' that cannot be written by the codec 'forgets'.*exp_avg/shift"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(monkeypatch, before, after, said, strict):
    for cls in (Raises, WrongShape, Forgets):
        monkeypatch.setitem(CODECS, cls.name, cls)
    p = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = build("AdamW", [p], "own8" if before else None)
    run(optimizer, [p], [[torch.ones(6, 4)]])
    saved = copy.deepcopy(optimizer.state_dict())
    if before:
        [group] = saved["param_groups"]
        group["hbcore"] = group["hbcore"].replace("own8", before.name)
    other = build("AdamW", [p], after and after.name)
    with pytest.raises(CheckpointError, match=said):
        other.load_state_dict(saved, strict=strict)
    assert not other.state


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.bool])
@pytest.mark.parametrize("after", [None, "own8", "log8"])
def test_integers_of_another_dtype_than_the_codec_stores_are_refused(after, dtype):
    params, optimizer = trained("AdamW", "own8")
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["exp_avg"] = entry["exp_avg"].to(dtype)
    with pytest.raises(CheckpointError, match=r"'exp_avg' of torch\..* the codec 'own8' stores torch.int8"):
        build("AdamW", params, after).load_state_dict(saved)


def test_a_codec_that_is_not_installed_is_named(monkeypatch):
    params, optimizer = trained("AdamW", "log8")
    saved = copy.deepcopy(optimizer.state_dict())
    monkeypatch.delitem(CODECS, "log8")
    with pytest.raises(CheckpointError, match="was saved with the codec 'log8'"):
        build("AdamW", params, None).load_state_dict(saved)


@pytest.mark.parametrize("ecc", [None, *CODECS, "bf16+8"])
def test_a_migration_finds_a_slot_that_only_the_old_version_had(monkeypatch, ecc):
    from hbcore.api import Migration, ScaleByAdam

    params, optimizer = trained("AdamW", ecc)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        for part in [part for part in entry if "exp_avg_sq" not in part and "exp_avg" in part]:
            entry[part.replace("exp_avg", "debiased")] = entry.pop(part)

    def rename(slots, step, group):
        slots["exp_avg"] = slots.pop("debiased")
        return slots

    monkeypatch.setattr(ScaleByAdam, "version", 2)
    monkeypatch.setattr(registry, "migrations", lambda: [Migration("adam", 1, rename)])
    other = build("AdamW", params, ecc)
    other.load_state_dict(saved)
    for ours, theirs in zip(values(other), values(optimizer), strict=True):
        assert all(torch.equal(ours[slot][0], theirs[slot][0]) for slot in theirs)


def whole(value):
    """A tensor from all ranks; torch sends no int16."""
    if not hasattr(value, "full_tensor"):
        return value
    return value.int().full_tensor().to(value.dtype) if value.dtype == torch.int16 else value.full_tensor()


def convert(rank, name, before, after, gathered, state):
    """On shards: ``state``, saved by the one codec and loaded by the other, whole; and the weights some steps later."""
    install(setattr)
    warnings.simplefilter("ignore")
    options = {"compile": "eager", **({"ecc": before} if before else {})}
    model, optimizer = jobs.build(name, options, "fsdp")
    jobs.train(model, optimizer, range(3))
    optimizer.load_state_dict(state)  # its own is equal to rounding errors, which a codec of few bits can make large
    saved = optimizer.state_dict()
    if gathered:
        saved["state"] = {i: {k: whole(v) for k, v in entry.items()} for i, entry in saved["state"].items()}
    options = {"compile": "eager", **({"ecc": after} if after else {})}
    other = jobs.class_of(name)(model.named_parameters(), lr=0.01, **options)
    other.load_state_dict(saved)
    entries = [{k: whole(v) for k, v in entry.items()} for entry in other.state_dict()["state"].values()]
    jobs.train(model, other, range(3, 5))
    return entries, jobs.whole(model)


@pytest.mark.broad  # processes
@pytest.mark.filterwarnings("ignore::hbcore.StateWarning")
@pytest.mark.parametrize("name", ["AdamW", "SOAP"])
@pytest.mark.parametrize(("before", "after"), [("log8", None), ("own8", "coarse8"), ("two", "bf16+16")])
@pytest.mark.parametrize("gathered", [False, True], ids=["sharded", "whole"])
def test_shards_convert_as_one_process_does(before, after, name, gathered):
    options = {"compile": "eager", **({"ecc": before} if before else {})}
    model, optimizer = jobs.build(name, options, "alone")
    jobs.train(model, optimizer, range(3))
    options = {"compile": "eager", **({"ecc": after} if after else {})}
    other = jobs.class_of(name)(model.named_parameters(), lr=0.01, **options)
    state = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(copy.deepcopy(state))
    entries = copy.deepcopy(list(other.state_dict()["state"].values()))
    jobs.train(model, other, range(3, 5))
    for found, params in on_ranks(2, convert, name, before, after, gathered, state):
        for ours, theirs in zip(found, entries, strict=True):
            assert list(ours) == list(theirs)
            for k, v in theirs.items():
                torch.testing.assert_close(ours[k], v, rtol=1e-6, atol=0)
        torch.testing.assert_close(params, jobs.whole(model), rtol=1e-5, atol=1e-6)
