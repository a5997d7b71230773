"""LZMA: an adaptive range coder, so its cost per symbol is not rounded up to whole bits.

The old .lzma wrapper (13 bytes) is the smallest that tells the decoder all it needs. The literal and position contexts
are liblzma's own: setting all three to 0, which suits independent bytes on paper, was measured 0.4% larger on Gaussian
symbols (285,200 against 283,948 bytes for 600,000 symbols of deviation 3).
"""

from __future__ import annotations

import lzma

FILTER = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24}  # decode.py reserves 2^25


def compress_words(raw: bytes, width_bytes: int) -> bytes:
    """One .lzma stream whose literals know which byte of its number each is: 950 bytes less for 22,000 fp16 numbers."""
    position_bits = {"lp": width_bytes.bit_length() - 1, "pb": 0}
    tried = ({**FILTER, **position_bits, "lc": literal_bits} for literal_bits in (0, 1))
    return min((lzma.compress(raw, format=lzma.FORMAT_ALONE, filters=[one]) for one in tried), key=len)


def compress(raw: bytes) -> bytes:
    """One .lzma stream."""
    return lzma.compress(raw, format=lzma.FORMAT_ALONE, filters=[FILTER])
