"""LZMA2 without the .xz wrapper: an adaptive range coder, so its cost per symbol is not rounded up to whole bits.

`lc`, `lp` and `pb` model the position and the previous byte of text and machine code. Neighbouring symbols of a row are
nearly independent, so all three are 0, which lets one table of bit probabilities settle sooner.
"""

from __future__ import annotations

import lzma

from pgolf_post.pack import decode

FILTER = {
    **decode.LZMA["filters"][0],  # the decoder must reserve the same dictionary
    "preset": 9 | lzma.PRESET_EXTREME,
    "lc": 0,
    "lp": 0,
    "pb": 0,
}


def compress(raw: bytes) -> bytes:
    """One raw LZMA2 stream."""
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=[FILTER])
