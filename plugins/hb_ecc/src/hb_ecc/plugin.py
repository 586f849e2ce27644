"""hb_ecc's manifest: its codecs, as plain data. Importing this module imports no torch."""

from __future__ import annotations

from hbcore.api import CodecSpec, hookimpl

API = (1, 8)


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
        CodecSpec(
            name="fp16+8",
            target="hb_ecc.codec:FP16Plus8",
            summary="float16 and an 8-bit correction: 3 bytes, relative error at most 2^-19 from 2^-14 to 65519.9",
        ),
        CodecSpec(
            name="fp16+16",
            target="hb_ecc.codec:FP16Plus16",
            summary="float16 and a 16-bit correction: 4 bytes, float32 bit for bit from 2^-14 to 65519.99",
        ),
        CodecSpec(
            name="int8",
            target="hb_ecc.blockwise:Int8",
            summary="8-bit codes and a scale for 32 elements: 1.06 bytes; nothing but zero is stored as zero",
        ),
        CodecSpec(
            name="uint8",
            target="hb_ecc.blockwise:UInt8",
            summary="int8 for state that is never negative, twice as fine: 1.125 bytes; 'int8' stores such state so by itself",
        ),
    ]
