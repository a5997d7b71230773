"""Documents: the units of a corpus. Each opens with BOS, and none is in both training and validation.

A corpus is any mix of text files (one document each), `.jsonl` and `.jsonl.zst` (one JSON object a line, with "text"
and optionally "source" and "path"). Files are streamed. A document's `key` is its identity: its source and path where
they are given, else the sha256 of its text. The same key always falls on the same side of the split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.errors import DamagedFileError, NotFoundError

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One document. `key` decides its split and its place; documents with the same key stay together."""

    key: str
    text: str


def text_key(text: str) -> str:
    """Return the key of a document that has no path: the sha256 of its text."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Stream the documents of text, .jsonl and .jsonl.zst files, in order. Raises NotFoundError, DamagedFileError."""
    for path in paths:
        if path.is_dir():
            raise NotFoundError(f"{path} is a folder, expected a file", hint=f"name its files: {path}/*.txt")
        if not path.is_file():
            raise NotFoundError(f"no such file: {path}", hint="pgolf-post data build --help")
        if path.name.endswith((".jsonl", ".jsonl.zst")):
            yield from _jsonl_documents(path)
        else:
            yield _text_document(path)


def _text_document(path: Path) -> Document:
    """Return a whole file as one document, with the newlines that are on disk."""
    text = _decode(path.read_bytes(), str(path))
    return Document(text_key(text), text)


def _decode(data: bytes, where: str) -> str:
    """Decode UTF-8 text. Raises DamagedFileError with the offset of the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(
            f"{where}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason})",
            hint="convert it first, for example: iconv -f LATIN1 -t UTF-8 FILE",
        ) from None


def _jsonl_documents(path: Path) -> Iterator[Document]:
    """Yield one document per non-blank line."""
    lines = _zstd_lines(path) if path.name.endswith(".zst") else _plain_lines(path)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _parse_line(line, f"{path} line {number}")


def _parse_line(line: bytes, where: str) -> Document:
    """Parse one JSON object as a document. Raises DamagedFileError naming file and line."""
    try:
        record = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise DamagedFileError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise DamagedFileError(f'{where}: a {type(record).__name__}, expected a JSON object with "text"')
    text = record.get("text")
    if not isinstance(text, str):
        problem = "is missing" if "text" not in record else f"is a {type(text).__name__}, expected a string"
        raise DamagedFileError(f'{where}: "text" {problem}; the keys are: {", ".join(sorted(record)) or "none"}')
    _refuse_lone_surrogates(text, where)
    return Document(_record_key(record, text), text)


def _refuse_lone_surrogates(text: str, where: str) -> None:
    """Raise DamagedFileError for half a surrogate pair (\\ud800), which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DamagedFileError(
            f'{where}: "text" has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, '
            "which is not Unicode text"
        ) from None


def _record_key(record: dict[str, Any], text: str) -> str:
    """Return the key of source and path, or of the text without a path (a source alone names a collection)."""
    if record.get("path") is None:
        return text_key(text)
    return json.dumps([record.get("source"), record["path"]], sort_keys=True)


def _plain_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _zstd_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a zstd file."""
    pending = b""
    for chunk in _zstd_chunks(path):
        *lines, pending = (pending + chunk).split(b"\n")
        yield from lines
    if pending:
        yield pending


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
