"""Bytes of corpus files, decompressed: what a file is, its first bytes say and not its name.

Compressed streams are read. Containers that need another library are refused by name, with a command that converts
them: read as text they would be scored as one document of their own syntax.
"""

from __future__ import annotations

import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from pgolf_post.data.compressed import ZSTD, codec_of
from pgolf_post.data.conversions import AS_LINES, to_lines
from pgolf_post.data.shard_kinds import MAGIC, VERSION
from pgolf_post.errors import DamagedFileError

READ_BYTES = 1 << 20
REFUSED = {  # (offset, magic) -> kind
    (0, b"PAR1"): "parquet",
    (0, b"PK\x03\x04"): "zip",
    (257, b"ustar"): "tar",
    (0, b"ARROW1"): "Arrow",
    (0, b"SQLite format 3"): "SQLite",
    (0, b"%PDF-"): "PDF",
    (0, b"\x93NUMPY"): "NumPy",
    (0, b"\x7fELF"): "ELF",
    (0, b"\0\5\x16\7"): "AppleDouble",
    (0, b"version https://git-lfs.github.com"): "Git LFS pointer",
    (0, MAGIC.to_bytes(4, "little") + VERSION.to_bytes(4, "little")): "shard",
}
OTHER_HINTS = {
    "Git LFS pointer": "git lfs pull",
    "shard": "pgolf-post data adopt FOLDER --tokenizer FILE.model",
    "AppleDouble": "leave it out: macOS keeps another file's attributes in it",
}
AGAIN = "fetch the file again"
BY_NAME = {".csv": "csv", ".tsv": "tsv"}


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, decompressed. Raises DamagedFileError for a damaged stream or a container not read here."""
    chunks = _decompressed(path)
    first = next(chunks, b"")
    _refuse_container(path, first)
    yield first
    yield from chunks


def _decompressed(path: Path) -> Iterator[bytes]:
    codec = codec_of(path)
    if codec == ZSTD:
        yield from _zstd_chunks(path)
        return
    opener = codec.opener if codec and codec.opener else Path.open
    try:
        with opener(path, "rb") as file:
            while data := file.read(READ_BYTES):
                yield bytes(data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if codec is None:
            raise
        raise DamagedFileError(f"{path}: not readable as {codec.name}: {error}", hint=AGAIN) from None


def _refuse_container(path: Path, first: bytes) -> None:
    """Raise DamagedFileError for a container, naming it and the command that converts it."""
    kinds = (kind for (offset, magic), kind in REFUSED.items() if first[offset : offset + len(magic)] == magic)
    plain = Path(re.sub(r"\.(gz|xz|bz2|zst)$", "", path.name.lower()))
    kind = next(kinds, BY_NAME.get(plain.suffix))
    if kind is not None:
        article = "an" if kind[0] in "AE" else "a"
        raise DamagedFileError(
            f"{path} is {article} {kind} file, which is not read here: inputs are text, JSON lines or a JSON array",
            hint=to_lines(kind, path) or OTHER_HINTS.get(kind, AS_LINES),
        )


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Yield decompressed pieces across all frames. Raises DamagedFileError for a corrupt or incomplete frame."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    started = False
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise DamagedFileError(f"{path}: not readable as zstd: {error}", hint=AGAIN) from None
                started, data = True, frame.unused_data
    if started and not frame.eof:
        raise DamagedFileError(f"{path}: the last zstd frame is cut off; the file is incomplete", hint=AGAIN)
