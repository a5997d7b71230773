"""Zstandard at level 22, alone or with a dictionary trained on the other units: measured, never shipped.

The decoder that ships has no zstd, and symbols of entropy 3.5 bits hold no repeats for a dictionary to know: see
docs/BENCHMARKS.md. Here so that `compress` can show it.
"""

from __future__ import annotations

from collections.abc import Sequence

import zstandard

LEVEL = 22
SAMPLE_BYTES, DICTIONARY_BYTES = 4096, 16384


def compress(raw: bytes, dictionary: bytes = b"") -> bytes:
    """One zstd frame without its checksum."""
    known = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    return zstandard.ZstdCompressor(level=LEVEL, dict_data=known, write_content_size=True).compress(raw)


def decompress(stream: bytes, dictionary: bytes = b"") -> bytes:
    """The bytes of one frame."""
    known = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    return zstandard.ZstdDecompressor(dict_data=known).decompress(stream)


def train(units: Sequence[bytes]) -> bytes:
    """A dictionary made of pieces of these units; empty where there is too little to train on."""
    pieces: list[bytes | bytearray | memoryview] = [
        unit[at : at + SAMPLE_BYTES] for unit in units for at in range(0, len(unit), 8 * SAMPLE_BYTES)
    ]
    try:
        return zstandard.train_dictionary(DICTIONARY_BYTES, pieces).as_bytes()
    except zstandard.ZstdError:
        return b""
