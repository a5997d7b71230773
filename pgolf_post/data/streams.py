"""Bytes of corpus files, decompressed: what a file is, its first bytes say and not its name.

Compressed streams are read. Containers that need another library are refused by name, with a command that converts
them: read as text they would be scored as one document of their own syntax.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pgolf_post.errors import DamagedFileError

READ_BYTES = 1 << 20
OPENERS: dict[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
    b"BZh": ("bzip2", bz2.open),
}
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
PARQUET = (
    "import sys, pandas; pandas.read_parquet(sys.argv[1])[['text']].to_json(sys.argv[2], orient='records', lines=True)"
)
CSV = "import sys, csv, json; [print(json.dumps({'text': row['text']})) for row in csv.DictReader(open(sys.argv[1]))]"
TSV = CSV.replace("argv[1])", "argv[1]), delimiter='\\t'")
CONVERSIONS = {
    "parquet": f'pip install pandas pyarrow && python -c "{PARQUET}" {{file}} {{stem}}.jsonl',
    "csv": f'python -c "{CSV}" {{file}} > {{stem}}.jsonl   (needs a column "text")',
    "tsv": f'python -c "{TSV}" {{file}} > {{stem}}.jsonl   (needs a column "text")',
    "zip": "unzip {file} -d {stem}, then name the files in it",
    "tar": "mkdir {stem} && tar -xf {file} -C {stem}, then name the files in it",
}
REFUSED = {  # (offset, magic) -> kind
    (0, b"PAR1"): "parquet",
    (0, b"PK\x03\x04"): "zip",
    (257, b"ustar"): "tar",
    (0, b"ARROW1"): "Arrow",
    (0, b"SQLite format 3"): "SQLite",
    (0, b"%PDF-"): "PDF",
    (0, b"\x93NUMPY"): "NumPy",
    (0, b"\x7fELF"): "ELF",
    (0, b"version https://git-lfs.github.com"): "Git LFS pointer",
}
BY_NAME = {".csv": "csv", ".tsv": "tsv"}


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file's bytes, decompressed. Raises DamagedFileError for a damaged stream or a container not read here."""
    chunks = _decompressed(path)
    first = next(chunks, b"")
    _refuse_container(path, first)
    yield first
    yield from chunks


def _decompressed(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(ZSTD_MAGIC) or path.name.lower().endswith(".zst"):
        yield from _zstd_chunks(path)
        return
    name, opener = next((row for magic, row in OPENERS.items() if head.startswith(magic)), ("", Path.open))
    try:
        with opener(path, "rb") as file:
            while data := file.read(READ_BYTES):
                yield bytes(data)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        if not name:
            raise
        raise DamagedFileError(f"{path}: not readable as {name}: {error}", hint="fetch the file again") from None


def _refuse_container(path: Path, first: bytes) -> None:
    """Raise DamagedFileError for a container, naming it and the command that converts it."""
    kinds = (kind for (offset, magic), kind in REFUSED.items() if first[offset : offset + len(magic)] == magic)
    plain = Path(path.name.lower().removesuffix(".gz").removesuffix(".xz").removesuffix(".bz2").removesuffix(".zst"))
    kind = next(kinds, BY_NAME.get(plain.suffix))
    if kind is None:
        return
    convert = CONVERSIONS.get(kind, 'write its documents as .jsonl, one {"text": …} a line')
    names = {"{file}": shlex.quote(str(path)), "{stem}": shlex.quote(path.name.split(".")[0])}
    for field, value in names.items():
        convert = convert.replace(field, value)
    raise DamagedFileError(
        f"{path} is a {kind} file, which is not read here: inputs are text, JSON lines or a JSON array",
        hint=convert,
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
                    raise DamagedFileError(f"{path}: not readable as zstd: {error}") from None
                started, data = True, frame.unused_data
    if started and not frame.eof:
        raise DamagedFileError(f"{path}: the last zstd frame is cut off; the file is incomplete")
