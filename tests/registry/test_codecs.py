"""Codecs by name: the same rules as for optimizers, and an error of their own."""

from __future__ import annotations

from typing import Any

import pytest

from hbcore.errors import AmbiguousNameError, PluginError, PluginWarning, UnknownCodecError, UnknownOptimizerError

CODECS = "@hookimpl\ndef hb_codecs(api): return [{}]\n"


def test_codecs_are_listed_and_imported_by_name(site: Any) -> None:
    specs = "CodecSpec('int8', 'hb_c.rules:Int8', ''), CodecSpec('bf16+8', 'hb_c.rules:B', '')"
    site.install("hb_c", CODECS.format(specs), rules="class B: pass\nInt8 = 'any object'")
    registry = site.registry()
    assert [codec.name for codec in registry.codecs()] == ["bf16+8", "int8"]
    assert registry.load_codec("BF16+8").__name__ == "B"
    assert registry.load_codec("hb_c:int8") == "any object"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fp8", r"No installed plugin provides the codec 'fp8'\. Installed codecs: near, q4"),
        ("naer", r"Did you mean near\? Installed codecs"),
        ("hb_c:naer", r"Plugin hb_c \(hb_c 1\.0\) provides no codec 'naer'\. Did you mean near\?"),
        ("nope:q4", r"No plugin named 'nope' is installed\. 'q4' exists as 'hb_c:q4'"),
        ("bf16+8", r"bf16\+8 comes with hb_ecc: pip install hb_ecc"),
        ("hb_ecc:bf16+16", r"bf16\+16 comes with hb_ecc: pip install hb_ecc"),
        ("fp16+8", r"fp16\+8 comes with hb_ecc: pip install hb_ecc"),
        ("INT8", r"int8 comes with hb_ecc: pip install hb_ecc"),
        ("hb_c:", "nothing follows the colon"),
        (8, "must be a string such as 'bf16\\+8'; got 8"),
    ],
)
def test_an_unknown_codec_has_an_error_of_its_own_and_a_remedy(site: Any, name: str, said: str) -> None:
    specs = "CodecSpec('near', 'hb_c.rules:Near', ''), CodecSpec('q4', 'hb_c.rules:Q', '')"
    site.install("hb_c", CODECS.format(specs))
    with pytest.raises(UnknownCodecError, match=said) as caught:
        site.registry().load_codec(name)
    assert isinstance(caught.value, LookupError) and not isinstance(caught.value, UnknownOptimizerError)


def test_the_built_in_familys_codec_wins_with_a_warning_that_names_both(site: Any) -> None:
    site.install("a_codecs", CODECS.format("CodecSpec('BF16+8', 'a_codecs.rules:Q', '')"), rules="class Q: pass")
    site.install("hb_ecc", CODECS.format("CodecSpec('bf16+8', 'hb_ecc.rules:Q', '')"), rules="class Q: pass")
    registry = site.registry()
    with pytest.warns(
        PluginWarning, match=r"'bf16\+8' means 'hb_ecc:bf16\+8' of hb_ecc .*; a_codecs .* found as 'a_codecs:BF16\+8'"
    ):
        assert registry.load_codec("bf16+8").__module__ == "hb_ecc.rules"
    assert registry.load_codec("a_codecs:bf16+8").__module__ == "a_codecs.rules"
    assert registry.conflicts() == []


def test_codec_trouble_is_told_apart(site: Any) -> None:
    site.install("hb_c", CODECS.format("CodecSpec('q', 'hb_c.rules:Q', '')"), rules="1 / 0")
    site.install("hb_d", CODECS.format("CodecSpec('q', 'hb_d.rules:Q', '')"))
    registry = site.registry()
    with pytest.raises(AmbiguousNameError, match=r"'hb_c:q' and .*'hb_d:q'"):
        registry.load_codec("q")
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        registry.load_codec("hb_c:q")
    registry.block("hb_ecc")
    site.install("hb_ecc", CODECS.format("CodecSpec('int8', 'hb_ecc.rules:Q', '')"))
    assert [str(c) for c in registry.conflicts()] == [
        "the codec name 'q' is claimed by hb_c (hb_c 1.0) as 'hb_c:q' and hb_d (hb_d 1.0) as 'hb_d:q'"
    ]
    with pytest.raises(UnknownCodecError, match="blocked by"):
        registry.load_codec("int8")
