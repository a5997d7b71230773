"""Text decodes to the same characters whatever an editor or shell put around it."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from pgolf_post.base.text import decode_text
from pgolf_post.errors import SettingsError
from pgolf_post.settings import read_toml

TEXT = 'name = "Σxxᵀ"\nlayers = 11\n'
WRITTEN = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16 with a mark": TEXT.encode("utf-16"),
    "utf-16 big": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32": TEXT.encode("utf-32"),
    "crlf": TEXT.replace("\n", "\r\n").encode(),
    "cr": TEXT.replace("\n", "\r").encode(),
}


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_every_way_of_writing_gives_one_text(tmp_path: Path, content: bytes) -> None:
    assert decode_text(content) == TEXT
    (tmp_path / "a.toml").write_bytes(content)
    assert read_toml(tmp_path / "a.toml") == {"name": "Σxxᵀ", "layers": 11}


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_seen_by_its_zeros(encoding: str) -> None:
    assert decode_text("layers = 11\n".encode(encoding)) == "layers = 11\n"


def test_bytes_that_are_no_text_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"name = '\xff\xe9'\n")
    with pytest.raises(SettingsError, match=r"a\.toml is not valid TOML"):
        read_toml(tmp_path / "a.toml")
    assert decode_text(b"", "strict") == ""
