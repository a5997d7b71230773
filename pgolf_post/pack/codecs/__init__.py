"""Codecs: bytes in, fewer bytes out. A row of `CODECS` for each that ships, of `YARDSTICKS` for each that is measured.

A codec that ships is a few lines here and a branch of `inflate` in pack/decode.py. That file ships with a submission,
imports nothing from this package and counts against the budget, so decompression is written there and only there. Ids
are written into artifacts: they are never reused or renumbered. A yardstick is a file of its own; `pgolf-post compress`
measures it, and no artifact holds it. Symbols have a codec of their own, `rans` (pack/coder/), which needs to know what
they are.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable
from typing import NamedTuple

import brotli

from pgolf_post.errors import SettingsError
from pgolf_post.pack import decode
from pgolf_post.pack.codecs import lrzip, zstd
from pgolf_post.pack.codecs.yardstick import Yardstick

BEST = "best"  # every codec is tried on every unit, the smallest stream is kept
RANS = "rans"  # symbols by rANS, everything else by the best of the codecs below
WORDS_ID = 6  # lzma of numbers of several bytes as they lie, not in planes
RANS_ID = 7  # what is written; 4 and 5 are contexts.Block.kind of older artifacts

BROTLI_QUALITY = 11  # searches context models and block splits, where symbols of blocks of unequal spread gain
BROTLI_WINDOW_BITS = 24  # 2^24 - 16 bytes, the largest of standard brotli: it covers a role
LZMA1 = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME}
LZMA_DICTIONARY, SMALL_DICTIONARY = 1 << 24, 1 << 16  # bytes; decode.py reserves 2^25


def compress_none(raw: bytes) -> bytes:
    """Return the bytes as they are: for units that are dense already, and as the measure of the other codecs."""
    return raw


def compress_brotli(raw: bytes) -> bytes:
    """Return one brotli stream: within 0.5% of the order-0 entropy of Gaussian symbols, and fast to decode."""
    stream: bytes = brotli.compress(raw, quality=BROTLI_QUALITY, lgwin=BROTLI_WINDOW_BITS)
    return stream


def compress_lzma(raw: bytes) -> bytes:
    """Return one stream of the old .lzma format, whose header of 13 bytes is the smallest that decodes by itself.

    Literal and position contexts are liblzma's own. All three at 0, which suits independent bytes on paper, was 0.4%
    larger on Gaussian symbols (285,200 against 283,948 bytes for 600,000 symbols of deviation 3).
    """
    return _lzma_alone(raw, {})


def _lzma_alone(raw: bytes, literals: dict[str, int]) -> bytes:
    """Return one .lzma stream, whose header names the large dictionary whatever its length.

    Short streams are made with a small one: the same bytes without tables of 2^24 entries, which cost 20 ms a unit.
    """
    size = SMALL_DICTIONARY if len(raw) <= SMALL_DICTIONARY else LZMA_DICTIONARY
    stream = lzma.compress(raw, format=lzma.FORMAT_ALONE, filters=[{**LZMA1, "dict_size": size, **literals}])
    return stream[:1] + LZMA_DICTIONARY.to_bytes(4, "little") + stream[5:]


def compress_zlib(raw: bytes) -> bytes:
    """Return one DEFLATE stream without zlib's header and checksum: every unit has a checksum of its own."""
    encoder = zlib.compressobj(9, zlib.DEFLATED, -15, 9)  # -15: the largest window, no header
    return encoder.compress(raw) + encoder.flush()


class Codec(NamedTuple):
    """One way to compress a unit that the decoder knows."""

    id: int  # in the file
    compress: Callable[[bytes], bytes]
    decode: str  # decompression without guards, an expression over the decoder's imports: for the exported snippet
    source: str


CODECS: dict[str, Codec] = {
    # name: Codec(id, compress, decode, source)
    "none": Codec(0, compress_none, "bytes", "no compression"),
    "brotli": Codec(1, compress_brotli, "brotli.decompress", "RFC 7932"),
    "lzma": Codec(2, compress_lzma, "lzma.decompress", "LZMA1, 7-zip.org/sdk.html"),
    "zlib": Codec(3, compress_zlib, "lambda data: zlib.decompress(data, -15)", "DEFLATE, RFC 1951"),
}
CHOICES = (*CODECS, RANS, BEST)  # of an artifact

YARDSTICKS: dict[str, Yardstick] = {
    # name: Yardstick(encode, why it cannot run here, source)
    "zstd": Yardstick(zstd.encode, zstd.missing, "RFC 8878"),
    "zstd-dictionary": Yardstick(zstd.encode_with_dictionary, zstd.missing, "RFC 8878, a dictionary of all units"),
    "lrzip": Yardstick(lrzip.encode, lrzip.missing, "zpaq by lrzip -z -L 9, as record submissions"),
    "lrzip-similar": Yardstick(lrzip.encode_similar, lrzip.missing, "the same, rows sorted by similarity"),
}


def check_codec(name: str) -> str:
    """Return `name` if an artifact can be packed by it. Raises SettingsError listing the valid ones."""
    if name not in CHOICES:
        raise SettingsError(f"unknown codec {name!r}; valid codecs: {', '.join(CHOICES)}")
    return name


def compress(raw: bytes, name: str) -> tuple[int, bytes]:
    """Return (codec id, stream) of `raw`. Of equally small streams "best" keeps the lowest id. Raises SettingsError."""
    if name not in CODECS and name != BEST:
        raise SettingsError(f"codec {name!r} does not take plain bytes; those that do: {', '.join(CODECS)}, {BEST}")
    tried = CODECS.values() if name == BEST else [CODECS[name]]
    streams = [(codec.id, codec.compress(raw)) for codec in tried]
    return min(streams, key=lambda stream: (len(stream[1]), stream[0]))


def compress_words(raw: bytes, width_bytes: int) -> tuple[int, bytes]:
    """Return (codec id, stream) of little-endian numbers of `width_bytes` bytes each, by lzma as they lie.

    Literals know which byte of its number each is: 950 bytes less than in planes for 22,000 fp16 numbers.
    """
    position_bits = {"lp": width_bytes.bit_length() - 1, "pb": 0}
    streams = (_lzma_alone(raw, {**position_bits, "lc": literal_bits}) for literal_bits in (0, 1))
    return WORDS_ID, min(streams, key=len)


def codec_name(codec_id: int) -> str:
    """Return the name of a codec id in a file. Raises SettingsError for an id that no codec has."""
    names = {codec.id: name for name, codec in CODECS.items()} | dict.fromkeys(decode.RANS, RANS) | {WORDS_ID: "lzma"}
    if codec_id not in names:
        raise SettingsError(f"unknown codec id {codec_id}; valid ids: {', '.join(map(str, names))}")
    return names[codec_id]
