"""The checks of codecs: every registered codec passes, and each check finds the fault that it is there for."""

from __future__ import annotations

import dataclasses
import inspect
from typing import ClassVar

import pytest
import torch

from hb_ecc.blockwise import Int8
from hb_ecc.codec import BF16Plus8, BF16Plus16
from hbcore.api import block_amax, spread
from hbcore.state.codec import Cast
from hbcore.testing import CODEC_CHECKS, assert_codec_conforms, check_codec, codec_subjects


def blocks_off_by(largest, digits):
    """Half a step of the root, 0.59 between codes 1 and 2, or a whole one below code 1."""

    def bound(x):
        wide = spread(block_amax(x.abs()), x) * (1 + 2.0 ** (1 - digits))
        root = x.abs().sqrt()
        step = wide.sqrt() / largest
        off = torch.where(root < step, step, 0.5859 * step)
        return (root + off).square() - x.abs() + 1e-6 * x.abs()

    return bound


BOUNDS = {
    "bf16+8": lambda x: 2.0**-16 * x.abs(),
    "bf16+16": lambda x: 0 * x,
    "fp16+8": lambda x: 2.0**-19 * x.abs() + 2.0**-33,
    "fp16+16": lambda x: 0 * x + 2.0**-41,
    "int8": blocks_off_by(127, 8),
    "uint8": blocks_off_by(255, 24),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_registered_codec_conforms(name):
    assert_codec_conforms(name, BOUNDS[name])


@pytest.mark.parametrize("codec", [Cast(), Cast(torch.bfloat16)], ids=lambda codec: codec.name)
def test_what_state_is_stored_with_by_default_conforms(codec):
    assert_codec_conforms(codec, lambda x: 2.0**-8 * x.abs())


class Breaks(BF16Plus8):
    """bf16+8, to be broken."""


class OtherDtype(Breaks):
    def write(self, stored, slot, value, noise=None):
        written = super().write(stored, slot, value, noise)
        return {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in written.items()}


class Offset(Breaks):
    def read(self, stored, slot, dtype):
        return super().read(stored, slot, dtype) + 1


class Creeps(Breaks):
    def read(self, stored, slot, dtype):
        return super().read(stored, slot, dtype) * 1.01


class Coarse(Breaks):
    def write(self, stored, slot, value, noise=None):
        return super().write(stored, slot, value.to(torch.bfloat16).to(value.dtype), noise)


class Heals(Breaks):
    def write(self, stored, slot, value, noise=None):
        return super().write(stored, slot, value.nan_to_num(), noise)


class Shifts(BF16Plus16):
    """Each element with its neighbour, and the last of a row with the next row."""

    def write(self, stored, slot, value, noise=None):
        return super().write(stored, slot, value.flatten().roll(1).view(value.shape), noise)


class Writes(Breaks):
    def write(self, stored, slot, value, noise=None):
        stored[slot].zero_()
        return super().write(stored, slot, value, noise)


class Biased(Breaks):
    @staticmethod
    def split(x, noise):
        return BF16Plus8.split(x, None if noise is None else noise & 0x7F)


class Sorts(Breaks):
    def write(self, stored, slot, value, noise=None):
        return super().write(stored, slot, torch.cummax(value, -1)[0] * 0 + value, noise)


@dataclasses.dataclass(frozen=True)
class WholeScale(Int8):
    """A scale a tensor in the place of one a block."""

    name: ClassVar[str] = "whole"

    def of(self, slot):
        return self

    def write(self, stored, slot, value, noise=None):
        written = super().write(stored, slot, value, noise)
        return {**written, f"{slot}#scale": 0 * written[f"{slot}#scale"] + value.abs().max()}


BROKEN = {
    "parts_are_as_declared": OtherDtype(),
    "zeros_are_zero": Offset(),
    "writing_what_was_read_changes_nothing": Creeps(),
    "values_come_back": Coarse(),
    "what_is_not_finite_stays_so": Heals(),
    "elements_are_stored_by_themselves": Shifts(),
    "reading_and_writing_are_pure": Writes(),
    "rounding_is_unbiased": Biased(),
    "every_operation_has_a_kernel": Sorts(),
}


@pytest.mark.parametrize("check", CODEC_CHECKS, ids=lambda check: check.__name__)
def test_a_broken_codec_is_found(check):
    assert (inspect.getdoc(check) or "").startswith("If this fails, ")
    [subject] = codec_subjects(BROKEN[check.__name__], BOUNDS["bf16+8"])
    with pytest.raises(AssertionError, match=r"expected|changed"):
        check(subject)


def test_a_scale_that_is_not_of_its_block_is_found():
    found = {finding.check for finding in check_codec(WholeScale())}
    assert "elements_are_stored_by_themselves" in found


def test_a_codec_that_chooses_by_the_slot_is_checked_for_both_kinds():
    assert [(type(s.codec).__name__, s.signed) for s in codec_subjects("int8")] == [("Int8", True), ("UInt8", False)]
    assert [(type(s.codec).__name__, s.signed) for s in codec_subjects("uint8")] == [("UInt8", False)]


def test_findings_name_codec_and_fault():
    with pytest.raises(AssertionError, match=r"checks failed:\nOffset\(\) fails \w+: expected"):
        assert_codec_conforms(Offset())
