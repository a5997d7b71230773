"""Corpus files are what their content says: compressed streams are read, containers refused with a command."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from pgolf_post.data.documents import read_documents
from pgolf_post.errors import DamagedFileError

TEXTS = ["one\nline", "zwölf", "three"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
ARRAY = json.dumps([{"text": text} for text in TEXTS])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.JSONL", LINES.encode()),
        ("a.txt", LINES.encode()),
        ("a.json", ARRAY.encode()),
        ("a", ARRAY.encode()),
        ("a.json.gz", gzip.compress(ARRAY.encode())),
        ("a.jsonl.gz", gzip.compress(LINES.encode())),
        ("a.jsonl.xz", lzma.compress(LINES.encode())),
        ("renamed", bz2.compress(LINES.encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # compressed bytes hold the time of day
)
def test_records_are_found_by_content(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert [document.text for document in read_documents([tmp_path / name])] == TEXTS


def packed(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "x")
    else:
        with tarfile.open(fileobj=file, mode="w") as archive_tar:
            archive_tar.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message", "hint"),
    [
        ("a.parquet", b"PAR1" + bytes(range(256)), "is a parquet file", "read_parquet"),
        ("a.csv", b"text\nx\n", "is a csv file", "csv.DictReader"),
        ("a.zip", packed("zip"), "is a zip file", "unzip"),
        ("a.tar.gz", gzip.compress(packed("tar")), "is a tar file", "tar -xf"),
        ("a.bin", b"ab\0c", "null byte at character 2", "jsonl"),
        ("a.json", b'{"rows": 1}', "an object, expected a list of objects .*; the keys are: rows", "jsonl"),
        ("._a.jsonl", b"\0\5\x16\7" + bytes(90), "is an AppleDouble file", "leave it out"),
        ("a.tokens", b"\x88\xd84\x01\1\0\0\0" + bytes(1016), "is a shard file", "data adopt"),
        ("cut.gz", gzip.compress(LINES.encode())[:-9], "not readable as gzip", "again"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # compressed bytes hold the time of day
)
def test_containers_are_refused_by_name(tmp_path: Path, name: str, data: bytes, message: str, hint: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DamagedFileError, match=message) as caught:
        list(read_documents([tmp_path / name]))
    assert hint in (caught.value.hint or "")
