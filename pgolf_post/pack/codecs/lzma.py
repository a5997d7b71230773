"""LZMA2 without the .xz wrapper: an adaptive range coder, so its cost per symbol is not rounded up to whole bits.

The literal and position contexts are liblzma's own. Setting all three to 0, which suits independent bytes on paper, was
measured 0.4% larger on Gaussian symbols (285,200 against 283,948 bytes for 600,000 symbols of deviation 3).
"""

from __future__ import annotations

import lzma

from pgolf_post.pack import decode

FILTER = {
    **decode.LZMA["filters"][0],  # the decoder must reserve the same dictionary
    "preset": 9 | lzma.PRESET_EXTREME,
}


def compress(raw: bytes) -> bytes:
    """One raw LZMA2 stream."""
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=[FILTER])
