"""Zstandard at level 22, alone or with a dictionary trained on the other units: measured, never shipped.

The decoder that ships has no zstd, and symbols of entropy 3.5 bits hold no repeats for a dictionary to know: see
docs/BENCHMARKS.md. Here so that `compress` can show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import zstandard

from pgolf_post.pack.codecs.yardstick import Encoded, SymbolUnit

LEVEL = 22
SAMPLE_BYTES, DICTIONARY_BYTES = 4096, 16384


def missing() -> str:
    """Return "": the library comes with this package."""
    return ""


def encode(units: Sequence[SymbolUnit], dictionary: bytes = b"") -> Encoded:
    """Compress each unit by itself, with a dictionary if one is given."""
    raws = [unit.planes for unit in units]
    streams = [compress(raw, dictionary) for raw in raws]
    return Encoded(raws, streams, len(dictionary), partial(decompress, dictionary=dictionary))


def encode_with_dictionary(units: Sequence[SymbolUnit]) -> Encoded:
    """Compress each unit with a dictionary trained on all of them."""
    return encode(units, train([unit.planes for unit in units]))


def compress(raw: bytes, dictionary: bytes = b"") -> bytes:
    """Return one zstd frame without its checksum."""
    trained = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    return zstandard.ZstdCompressor(level=LEVEL, dict_data=trained, write_content_size=True).compress(raw)


def decompress(stream: bytes, dictionary: bytes = b"") -> bytes:
    """Return the bytes of one frame."""
    trained = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    return zstandard.ZstdDecompressor(dict_data=trained).decompress(stream)


def train(units: Sequence[bytes]) -> bytes:
    """Return a dictionary made of pieces of these units; empty where there is too little to train on."""
    pieces: list[bytes | bytearray | memoryview] = [
        unit[at : at + SAMPLE_BYTES] for unit in units for at in range(0, len(unit), 8 * SAMPLE_BYTES)
    ]
    try:
        return zstandard.train_dictionary(DICTIONARY_BYTES, pieces).as_bytes()
    except zstandard.ZstdError:
        return b""
