"""LZMA: an adaptive range coder, so its cost per symbol is not rounded up to whole bits.

The old .lzma wrapper (13 bytes) is the smallest that tells the decoder all it needs. The literal and position contexts
are liblzma's own: setting all three to 0, which suits independent bytes on paper, was measured 0.4% larger on Gaussian
symbols (285,200 against 283,948 bytes for 600,000 symbols of deviation 3).
"""

from __future__ import annotations

import lzma

FILTER = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24}  # decode.py reserves 2^25


def compress(raw: bytes) -> bytes:
    """One .lzma stream."""
    return lzma.compress(raw, format=lzma.FORMAT_ALONE, filters=[FILTER])
