"""Codecs: bytes in, fewer bytes out. One file and one row of `CODECS` each.

Only compression lives here. Decompression lives once, in `pack/decode.py`, which ships with a submission and therefore
imports nothing from this package; a codec's `id` is its branch there. Ids are written into artifacts: they are never
reused or renumbered. Symbols have a codec of their own, `rans` (pack/rans.py), which needs to know what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pgolf_post.errors import SettingsError
from pgolf_post.pack import decode
from pgolf_post.pack.codecs import brotli, lzma, none, zlib

BEST = "best"  # every codec is tried on every unit, the smallest stream is kept
RANS = "rans"  # symbols by rANS, everything else by the best of the codecs below
WORDS_ID = 6  # lzma of numbers of several bytes as they lie, not in planes
RANS_ID = 7  # what is written; 4 and 5 are contexts.Block.kind of older artifacts


class Codec(NamedTuple):
    """One way to compress a unit."""

    id: int
    compress: Callable[[bytes], bytes]


CODECS: dict[str, Codec] = {
    # name: Codec(id in the file, compress)
    "none": Codec(0, none.compress),
    "brotli": Codec(1, brotli.compress),
    "lzma": Codec(2, lzma.compress),
    "zlib": Codec(3, zlib.compress),
}
CHOICES = (*CODECS, RANS, BEST)


def check_codec(name: str) -> str:
    """Return `name` if it names a codec or is "best". Raises SettingsError naming the valid ones."""
    if name not in CHOICES:
        raise SettingsError(f"unknown codec {name!r}; valid codecs: {', '.join(CHOICES)}")
    return name


def compress(raw: bytes, name: str) -> tuple[int, bytes]:
    """(codec id, stream) of `raw`. Of equally small streams "best" keeps the lowest id. Raises SettingsError."""
    if name not in CODECS and name != BEST:
        raise SettingsError(f"codec {name!r} does not take plain bytes; those that do: {', '.join(CODECS)}, {BEST}")
    tried = CODECS.values() if name == BEST else [CODECS[name]]
    streams = [(codec.id, codec.compress(raw)) for codec in tried]
    return min(streams, key=lambda stream: (len(stream[1]), stream[0]))


def compress_words(raw: bytes, width_bytes: int) -> tuple[int, bytes]:
    """(codec id, stream) of little-endian numbers of so many bytes."""
    return WORDS_ID, lzma.compress_words(raw, width_bytes)


def codec_name(codec_id: int) -> str:
    """The name of a codec id found in a file. Raises SettingsError for an id that no codec has."""
    known = {codec.id: name for name, codec in CODECS.items()} | dict.fromkeys(decode.RANS, RANS) | {WORDS_ID: "lzma"}
    if codec_id not in known:
        raise SettingsError(f"unknown codec id {codec_id}; valid ids: {', '.join(map(str, known))}")
    return known[codec_id]
