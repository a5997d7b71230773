"""Raw DEFLATE (RFC 1951) at level 9, without the zlib header and checksum: every unit has a checksum of its own."""

from __future__ import annotations

import zlib

LEVEL = 9
RAW_WINDOW_BITS = -15  # negative: no header


def compress(raw: bytes) -> bytes:
    """One DEFLATE stream."""
    encoder = zlib.compressobj(LEVEL, zlib.DEFLATED, RAW_WINDOW_BITS, 9)
    return encoder.compress(raw) + encoder.flush()
