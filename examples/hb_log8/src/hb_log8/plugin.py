"""The manifest: what the package provides, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import CodecSpec, hookimpl

API = (1, 8)

CODECS = (
    CodecSpec(
        name="log8",
        target="hb_log8.log8:Log8",
        summary="8-bit logarithms below each block's largest magnitude: 1.125 bytes, relative error 1/16 over 15 octaves",
    ),
)


@hookimpl
def hb_codecs(api: object) -> tuple[CodecSpec, ...]:
    """The one codec."""
    return CODECS
