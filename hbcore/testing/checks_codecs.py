"""Checks of codecs by themselves: what the engine takes for granted of any of them, and what users lose otherwise."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hbcore.state.blocks import BLOCK
from hbcore.testing import expect
from hbcore.testing.codec_subject import SHAPES, SLOT, CodecSubject


def parts_are_as_declared(subject: CodecSubject) -> None:
    """If this fails, the engine allocates other tensors than the codec writes, and checkpoints do not load."""
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float64):
            blank = subject.blank(shape, dtype)
            x = subject.values(shape).to(dtype)
            found = subject.write(x)
            assert found.keys() == blank.keys(), f"expected write to return {sorted(blank)}, found {sorted(found)}"
            for name, value in found.items():
                wanted = blank[name]
                assert value.dtype == wanted.dtype, f"expected {name} to be {wanted.dtype} as in parts(), found {value.dtype}"
                assert value.shape == wanted.shape, (
                    f"expected {name} of {shape} to be {tuple(wanted.shape)}, found {tuple(value.shape)}"
                )
            back = subject.read(found, dtype)
            assert back.shape == x.shape and back.dtype == dtype, (
                f"expected read to return {dtype} of shape {shape}, found {back.dtype} of shape {tuple(back.shape)}"
            )
    assert subject.per_block() <= subject.blank(SHAPES[0]).keys(), "expected per_block() to name parts"
    other = {name.replace(SLOT, "v") for name in subject.codec.parts(SLOT, torch.float32)}
    assert set(subject.codec.parts("v", torch.float32)) == other, "expected the parts' names to begin with the slot's"


def zeros_are_zero(subject: CodecSubject) -> None:
    """If this fails, state does not start at zero, or what is exactly zero becomes something else."""
    for shape in SHAPES:
        fresh = subject.read(subject.blank(shape))
        assert not fresh.any(), f"expected parts full of zeros to read as zero, found {float(fresh.abs().max()):g}"
        x = subject.values(shape)
        back = subject.read(subject.write(x))
        assert not back[x == 0].any(), (
            f"expected zero among other values to come back as zero, found {float(back[x == 0].abs().max()):g}"
        )
        back = subject.read(subject.write(torch.zeros(shape)))
        assert not back.any(), f"expected zeros to come back as zeros, found {float(back.abs().max()):g}"


def writing_what_was_read_changes_nothing(subject: CodecSubject) -> None:
    """If this fails, state drifts whenever it is stored and nothing has changed, such as when checkpoints are converted."""
    for seed, shape in enumerate(SHAPES):
        once = subject.write(subject.values(shape, seed))
        twice = subject.write(subject.read(once))
        expect.same(twice, once, f"what was read of {shape}, written again")


def values_come_back(subject: CodecSubject) -> None:
    """If this fails, the error is larger than the codec's author promises, or a sign is lost."""
    for seed, shape in enumerate(SHAPES):
        x = subject.values(shape, seed)
        back = subject.read(subject.write(x)).double()
        x = x.double()
        flipped = int((back * x < 0).sum())
        assert not flipped, f"expected every sign to be kept, found {flipped} of {x.numel()} changed"
        if subject.bound is not None:
            error, bound = (back - x).abs(), subject.bound(x)
            worst = int((error - bound).argmax())
            assert bool((error <= bound).all()), (
                f"expected {x.flatten()[worst]:g} within {bound.flatten()[worst]:g}, found {back.flatten()[worst]:g}"
            )
    x = subject.values(SHAPES[0]).double()
    expect.same({"value": subject.read(subject.write(x), torch.float64)}, {"value": x}, "a float64 value, written and read")


def what_is_not_finite_stays_so(subject: CodecSubject) -> None:
    """If this fails, a gradient of inf or NaN leaves state that looks healthy and is not."""
    for bad in (float("inf"), float("nan")):
        x = subject.values(SHAPES[0])
        x[2, 5] = bad
        back = subject.read(subject.write(x))
        assert not back[2, 5].isfinite(), f"expected {bad} to come back as inf or NaN, found {float(back[2, 5]):g}"
        assert bool(back[3].isfinite().all()), f"expected a row without {bad} to stay finite, found {back[3].tolist()[:4]}"


def elements_are_stored_by_themselves(subject: CodecSubject) -> None:
    """If this fails, results depend on how tensors are cut, packed or sharded."""
    x = subject.values((8, 64))
    first = subject.write(x)
    cut = [subject.write(row) for row in x]
    for name, value in first.items():
        together = torch.cat([part[name] for part in cut])
        expect.same({name: together}, {name: value.flatten()}, "rows written one by one, against all at once")
    changed = x.clone()
    changed[4, 3] = 0.5 * float(x.abs().max())
    back, other = subject.read(first), subject.read(subject.write(changed))
    differs = (back != other).nonzero().tolist()
    near = [[4, i] for i in range(BLOCK)] if subject.per_block() else [[4, 3]]
    assert all(at in near for at in differs), (
        f"expected a new value at (4, 3) to change {near[0]} to {near[-1]} at most, found {differs}"
    )


def reading_and_writing_are_pure(subject: CodecSubject) -> None:
    """If this fails, the engine's tensors are changed behind its back, or a step cannot be repeated."""
    x = subject.values(SHAPES[0])
    stored, noise = subject.write(x), torch.arange(x.numel(), dtype=torch.int32).view(x.shape)
    given = {"value": x, "noise": noise, **stored}
    before = {name: tensor.clone() for name, tensor in given.items()}
    results = [
        {**subject.codec.write(stored, SLOT, x, noise), "read": subject.codec.read(stored, SLOT, torch.float32)}
        for _ in range(2)
    ]
    expect.same(given, before, "reading and writing changed an argument")
    expect.same(results[1], results[0], "writing and reading the same again")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(subject.codec)))
    assert twin == subject.codec, f"expected a copy of the codec to be equal to it, found {twin!r} and {subject.codec!r}"


def rounding_is_unbiased(subject: CodecSubject) -> None:
    """If this fails, stochastic rounding moves averages. Only for codecs that round stochastically."""
    if not subject.codec.rounds:
        return
    count = 1 << getattr(subject.codec, "noise_bits", 16)  # noise is uniform in [0, count)
    noise = torch.arange(64).remainder(count) if count < 64 else torch.arange(count)
    noise = noise.to(torch.int32).view(-1, 64)
    for value in subject.values((40,)).tolist():
        x = torch.full(noise.shape, value)
        back = subject.read(subject.write(x, noise)).double()
        gap = float(back.max() - back.min())
        off = abs(float(back.mean()) - float(x[0, 0].double()))
        nearest = abs(float(subject.read(subject.write(x))[0, 0].double() - x[0, 0].double()))
        assert off <= max(0.02 * gap, 2.0**-20 * abs(value)), (
            f"expected {value:g} on average over all noise, found {off:g} off, where neighbours are {gap:g} apart"
        )
        assert gap > 0 or nearest == 0, f"expected {value:g}, which is not stored exactly, to be rounded both ways"


def every_operation_has_a_kernel(subject: CodecSubject) -> None:
    """If this fails, the step is not one kernel, and falls back to a slower backend or to one parameter at a time."""
    from hbcore.engine.backends.triton.ops import OPERATIONS

    known = {*OPERATIONS, torch.ops.hbcore.block_amax.default, torch.ops.hbcore.spread.default}
    x = subject.values((128,))
    stored, noise = subject.write(x), torch.zeros(128, dtype=torch.int32) if subject.codec.rounds else None
    with _Calls() as calls:
        subject.codec.write(stored, SLOT, x, noise)
        subject.codec.read(stored, SLOT, torch.float32)
    unknown = sorted({str(f) for f in calls.made if f not in known})
    assert not unknown, f"expected operations that kernels are generated for, found {', '.join(unknown)}"


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The ATen operations that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        harmless = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default)
        if func not in harmless:
            self.made.append(func)
        return func(*args, **(kwargs or {}))


CODEC_CHECKS: tuple[Callable[[CodecSubject], None], ...] = (
    parts_are_as_declared,
    zeros_are_zero,
    writing_what_was_read_changes_nothing,
    values_come_back,
    what_is_not_finite_stays_so,
    elements_are_stored_by_themselves,
    reading_and_writing_are_pure,
    rounding_is_unbiased,
    every_operation_has_a_kernel,
)
