"""log8 against logarithms in Python, its bounds, and the conformance kit of codecs."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from hb_log8.log8 import Log8
from hbcore.api import BlockCodec, block_amax, spread
from hbcore.registry import Registry
from hbcore.testing import CODEC_CHECKS, codec_subjects

CODEC = Log8()


def written(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return CODEC.write({"s": torch.zeros(0, dtype=torch.int8)}, "s", x)


def round_trip(x: torch.Tensor) -> torch.Tensor:
    return CODEC.read(written(x), "s", torch.float32)


def logarithm(x: float) -> float:
    """Straight lines between the powers of two."""
    mantissa, exponent = math.frexp(x)
    return exponent + 2 * mantissa - 2


def samples(sigma: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.exp(sigma * torch.randn(40, 64, generator=generator)) * torch.randn(40, 64, generator=generator).sign()
    x.view(-1)[::9] = 0
    return x


@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0])
def test_codes_are_rounded_logarithms(sigma: float) -> None:
    x = samples(sigma)
    codes, largest = written(x)["s"].view(-1, 32).tolist(), x.abs().view(-1, 32).amax(1).tolist()
    for row, top, code in zip(x.view(-1, 32).tolist(), largest, codes, strict=True):
        for value, q in zip(row, code, strict=True):
            if value:
                below = 8 * (logarithm(top) - logarithm(abs(value)))
                assert abs(q) == max(1, 127 - round(below)) or abs(below % 1 - 0.5) < 1e-4
            assert (q > 0) - (q < 0) == (value > 0) - (value < 0)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0, 12.0])
def test_the_error_is_within_its_bounds_and_nothing_else_is_zero(sigma: float) -> None:
    x = samples(sigma)
    back, wide = round_trip(x), spread(block_amax(x.abs()), x)
    inside = x.abs() >= 2.0**-15 * wide
    error = ((back - x).double().abs() / x.double().abs())[inside & (x != 0)]
    assert 0.05 < float(error.max()) <= 1 / 16
    assert torch.equal(back == 0, x == 0) and bool((back.abs() <= wide).all())
    assert bool((back.abs() <= 2.0**-15 * 17 / 16 * wide)[~inside].all())


def block(*values: float, fill: float = 0.0) -> torch.Tensor:
    return torch.tensor([*values, *[fill] * (32 - len(values))])


def test_the_ends() -> None:
    tiny = round_trip(block(1e-44, 1e-45))
    assert bool((tiny[:2] > 0).all()) and not tiny[2:].any()
    largest = torch.finfo(torch.float32).max
    assert float(round_trip(block(largest, 1.0))[0]) == largest
    for bad in (math.inf, math.nan):
        back = round_trip(block(bad, 1.0, -2.0))
        assert not back[:3].isfinite().any() and not back[3:].any()


@pytest.mark.parametrize("check", CODEC_CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(check) -> None:  # type: ignore[no-untyped-def]
    [subject] = codec_subjects(CODEC, lambda x: x.abs() / 16 + 2.0**-15 * spread(block_amax(x.abs()), x))
    check(subject)


def test_the_entry_point_offers_it() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert '[project.entry-points."hbcore.plugins"]\nhb_log8 = "hb_log8.plugin"' in project
    registry = Registry(lambda: [EntryPoint("hb_log8", "hb_log8.plugin", "hbcore.plugins")])
    assert registry.load_codec("log8") is Log8 and isinstance(Log8(), BlockCodec)
