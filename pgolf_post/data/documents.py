"""Documents: the units of a corpus. Each opens with BOS, and none is in both training and validation.

A corpus is any mix of text files (one document each), JSON lines (one object a line, with "text" and optionally
"source" and "path") and JSON arrays of such objects, plain or compressed; content decides. Lines are streamed.
A document's `key` is its identity: its source and path where they are given, else the sha256 of its text. The same key
always falls on the same side of the split.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf_post.base.paths import absent
from pgolf_post.data.conversions import AS_LINES, rename_key, to_utf8, without_line
from pgolf_post.data.json_records import JSONFault, json_kind, parse_json
from pgolf_post.data.streams import read_chunks
from pgolf_post.errors import DamagedFileError, NotFoundError

NOT_A_PAGE = "fetch the file itself: on Hugging Face /resolve/ in place of /blob/, on GitHub the raw file"
LINE_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """One document. `key` decides its split and its place; documents with the same key stay together."""

    key: str
    text: str


def text_key(text: str) -> str:
    """Return the key of a document that has no path: the sha256 of its text."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Stream the documents of text and JSON files, in order. Raises NotFoundError, DamagedFileError."""
    for path in paths:
        if path.is_dir():
            raise NotFoundError(f"{path} is a folder, expected a file", hint=f"name its files: {path}/*.txt")
        if not path.is_file():
            raise NotFoundError(absent(path), hint="pgolf-post data build --help")
        yield from _file_documents(path)


def _file_documents(path: Path) -> Iterator[Document]:
    """Yield a file's documents: by line, of an array, or the whole file."""
    lines = _lines(path)
    head = next((line for line in lines if line.strip()), b"")
    lines.close()
    name = path.name.lower()
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        yield from _text_documents(path, _decode_utf16(path))
    elif any(f"{suffix}." in f"{name}." for suffix in LINE_SUFFIXES) or _is_record(head):
        yield from _jsonl_documents(path)
    else:
        yield from _text_documents(path, _decode(b"".join(read_chunks(path)), str(path), path))


def _is_record(line: bytes) -> bool:
    """Return whether a line is a JSON object with "text", whatever the file is called."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "text" in record


def _decode_utf16(path: Path) -> str:
    try:
        return b"".join(read_chunks(path)).decode("utf-16")
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path}: not UTF-16 text: {error.reason} at offset {error.start}") from None


def _text_documents(path: Path, text: str) -> Iterator[Document]:
    """Yield a text whole as one document, with the newlines that are on disk; of a JSON file, its records."""
    text = text.removeprefix("\ufeff")
    if "\0" in text:
        raise DamagedFileError(
            f"{path} is a binary file: it has a null byte at character {text.index(chr(0))}",
            hint=AS_LINES,
        )
    name = path.name.lower()
    if any(f"{suffix}." in f"{name}." for suffix in LINE_SUFFIXES):
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _parse_line(line.encode("utf-8"), path, number)
    elif ".json." in f"{name}." or (text.lstrip()[:1] == "[" and _is_array(text)):
        yield from _array_documents(path, text)
    elif text:
        yield Document(text_key(text), text)


def _is_array(text: str) -> bool:
    """Return whether a text is a JSON array of objects with "text"."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(records) and all(isinstance(record, dict) and "text" in record for record in records)


def _array_documents(path: Path, text: str) -> Iterator[Document]:
    """Yield the documents of a JSON array. Raises DamagedFileError for any other JSON."""
    try:
        records = parse_json(text)
    except JSONFault as error:
        raise DamagedFileError(f"{path}: {error}", hint=AS_LINES) from None
    if not isinstance(records, list):
        raise DamagedFileError(
            f'{path}: {json_kind(records)}, expected a list of objects with "text"{_keys_of(records)}', hint=AS_LINES
        )
    for number, record in enumerate(records, start=1):
        yield _record_document(record, f"{path} record {number}", lambda: AS_LINES)


def _decode(data: bytes, where: str, path: Path) -> str:
    """Decode UTF-8 text. Raises DamagedFileError with the offset of the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFileError(
            f"{where}: not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} ({error.reason})",
            hint=to_utf8(path),
        ) from None


def _jsonl_documents(path: Path) -> Iterator[Document]:
    """Yield one document per non-blank line."""
    for number, line in enumerate(_lines(path), start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield _parse_line(text, path, number)


def _parse_line(line: bytes, path: Path, number: int) -> Document:
    """Parse one JSON object as a document. Raises DamagedFileError naming file and line."""
    where = f"{path} line {number}"
    try:
        record = parse_json(_decode(line, where, path))
    except JSONFault as error:
        if number == 1 and line.lstrip().startswith(b"<"):
            raise DamagedFileError(f"{path} is an HTML or XML page, not JSON lines", hint=NOT_A_PAGE) from None
        raise DamagedFileError(f"{where}: {error}", hint=without_line(path, number)) from None
    renamed = _text_key(record) if number == 1 else None

    def hint() -> str:
        return rename_key(path, renamed) if renamed else without_line(path, number)

    return _record_document(record, where, hint)


def _record_document(record: Any, where: str, hint: Callable[[], str]) -> Document:
    """Return one record's document. Raises DamagedFileError if it is no object with "text".

    `hint` is called for an error alone: it reads the file's first bytes, and documents are many.
    """
    if not isinstance(record, dict):
        raise DamagedFileError(f'{where}: {json_kind(record)}, expected a JSON object with "text"', hint=hint())
    text = record.get("text")
    if not isinstance(text, str):
        problem = "is missing" if "text" not in record else f"is {json_kind(text)}, expected a string"
        raise DamagedFileError(f'{where}: "text" {problem}{_keys_of(record)}', hint=hint())
    _refuse_lone_surrogates(text, where, hint)
    return Document(_record_key(record, text), text)


def _keys_of(record: Any) -> str:
    """Return an object's keys as the end of a sentence; nothing for what is no object."""
    return f"; the keys are: {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else ""


def _text_key(record: Any) -> str | None:
    """Return the key of an object without "text" that holds its longest string; None if it has none."""
    if not isinstance(record, dict) or "text" in record:
        return None
    strings = {key: value for key, value in record.items() if isinstance(value, str)}
    return max(strings, key=lambda key: len(strings[key])) if strings else None


def _refuse_lone_surrogates(text: str, where: str, hint: Callable[[], str]) -> None:
    """Raise DamagedFileError for half a surrogate pair (\\ud800), which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DamagedFileError(
            f'{where}: "text" has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, '
            "which is not Unicode text",
            hint=hint(),
        ) from None


def _record_key(record: dict[str, Any], text: str) -> str:
    """Return the key of source and path, or of the text without a path (a source alone names a collection)."""
    if record.get("path") is None:
        return text_key(text)
    return json.dumps([record.get("source"), record["path"]], sort_keys=True)


def _lines(path: Path) -> Generator[bytes, None, None]:
    """Yield the lines of a file, decompressed."""
    pending: list[bytes] = []
    for chunk in read_chunks(path):
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            yield b"".join([*pending, line])
            pending = []
        pending.append(rest)
    if any(pending):
        yield b"".join(pending)
