"""hb_ecc's manifest: its codecs, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import CodecSpec, hookimpl

API = (1, 0)


@hookimpl
def hb_codecs(api: object) -> list[CodecSpec]:
    """The storage codecs."""
    return [
        CodecSpec(
            name="bf16+8",
            target="hb_ecc.codec:BF16Plus8",
            summary="bfloat16 and an 8-bit correction: 3 bytes, relative error at most 2^-16",
        ),
        CodecSpec(
            name="bf16+16",
            target="hb_ecc.codec:BF16Plus16",
            summary="bfloat16 and a 16-bit correction: 4 bytes, float32 bit for bit",
        ),
    ]
