"""Compressed streams: known by their first bytes, opened by the standard library, undone by a tool of the system."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Codec(NamedTuple):
    """A compression: its name, its first bytes, what opens it here, and the command that prints it unpacked."""

    name: str
    magic: bytes
    opener: Callable[..., Any] | None  # None: zstd, which is read frame by frame
    unpack: str


CODECS = (
    Codec("gzip", b"\x1f\x8b", gzip.open, "gzip -dc"),
    Codec("xz", b"\xfd7zXZ\x00", lzma.open, "xz -dc"),
    Codec("bzip2", b"BZh", bz2.open, "bzip2 -dc"),
    Codec("zstd", b"\x28\xb5\x2f\xfd", None, "zstd -dc"),
)
ZSTD = CODECS[-1]


def codec_of(path: Path) -> Codec | None:
    """Return a file's codec by its first bytes, or by the name .zst; None for a plain file."""
    with path.open("rb") as file:
        head = file.read(8)
    found = next((codec for codec in CODECS if head.startswith(codec.magic)), None)
    return found or (ZSTD if path.name.lower().endswith(".zst") else None)
