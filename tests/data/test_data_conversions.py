"""Commands that data errors print: run as printed, each gives the documents that were in the file."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import zstandard
from printed_command import run_printed

from pgolf_post.data.conversions import PARQUET, to_lines
from pgolf_post.data.documents import read_documents
from pgolf_post.errors import DamagedFileError

TEXTS = ['one, "two"\r\nthree', "zwölf\n\n$HOME `x` 'y'", "long " * 40_000]
KEYED = "".join(json.dumps({"content": text, "id": "x"}) + "\n" for text in TEXTS)
FOLDER = "it's a folder"


def table(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    rows = csv.writer(file, delimiter=delimiter)
    rows.writerows([["id", "text"], *([str(number), text] for number, text in enumerate(TEXTS))])
    return b"\xef\xbb\xbf" + file.getvalue().encode()


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    content = KEYED.replace('"content"', '"text"').encode()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("in.jsonl", content)
    else:
        with tarfile.open(fileobj=file, mode="w") as packed_tar:
            info = tarfile.TarInfo("in.jsonl")
            info.size = len(content)
            packed_tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


FILES: dict[str, tuple[bytes, str]] = {  # name: (content, what the command makes)
    "a b.csv": (table(","), "a b.csv.jsonl"),
    "-docs.csv": (table(","), "-docs.csv.jsonl"),
    "a.tsv": (table("\t"), "a.tsv.jsonl"),
    "a.csv.gz": (gzip.compress(table(",")), "a.csv.jsonl"),
    "a.csv.xz": (lzma.compress(table(",")), "a.csv.jsonl"),
    "a.csv.bz2": (bz2.compress(table(",")), "a.csv.jsonl"),
    "a.tar": (archive("tar"), "a.tar.files/in.jsonl"),
    "a.tar.gz": (gzip.compress(archive("tar")), "a.tar.files/in.jsonl"),
    "keyed.jsonl": (KEYED.encode(), "keyed.text.jsonl"),
    "keyed.jsonl.gz": (gzip.compress(KEYED.encode()), "keyed.text.jsonl"),
    "keyed16.jsonl": (KEYED.encode("utf-16"), "keyed16.text.jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_printed_command_gives_the_documents(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, result = FILES[name]
    (tmp_path / FOLDER).mkdir()
    monkeypatch.chdir(tmp_path)
    path = Path(FOLDER) / name if not name.startswith("-") else Path(name)
    path.write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        list(read_documents([path]))
    run_printed(caught.value.hint, tmp_path)
    assert [document.text for document in read_documents([tmp_path / result])] == TEXTS
    assert path.read_bytes() == content


def test_the_command_leaves_a_bad_line_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) for text in TEXTS]
    Path("cut.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, lines[0][:9]]).encode()))
    with pytest.raises(DamagedFileError, match=r"cut\.jsonl\.gz line 4: not valid JSON") as caught:
        list(read_documents([Path("cut.jsonl.gz")]))
    run_printed(caught.value.hint, tmp_path)
    assert [document.text for document in read_documents([tmp_path / "cut.rest.jsonl"])] == TEXTS


def test_parquet_names_its_packages_and_reads_one_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "-m pip install pandas pyarrow && " in str(to_lines("parquet", tmp_path / "a.parquet"))
    asked: list[Any] = []

    class Frame:
        def to_json(self, path: str, **options: Any) -> None:
            asked.append((path, options))

    def read_parquet(path: str, columns: list[str]) -> Frame:
        asked.append((path, columns))
        return Frame()

    pandas = types.ModuleType("pandas")
    pandas.read_parquet = read_parquet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    monkeypatch.setattr(sys, "argv", ["-c", "in", "out"])
    exec(compile(PARQUET, "<hint>", "exec"), {})
    assert asked == [("in", ["text"]), ("out", {"orient": "records", "lines": True})]


@pytest.mark.parametrize("name", ["a.zip", "a.csv.zst"])
def test_commands_whose_tool_may_be_absent(name: str, tmp_path: Path) -> None:
    content = archive("zip") if name == "a.zip" else zstandard.compress(table(","))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedFileError) as caught:
        list(read_documents([tmp_path / name]))
    assert (caught.value.hint or "").startswith("mkdir a.zip.files && unzip " if name == "a.zip" else "zstd -dc ")
