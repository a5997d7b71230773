"""A path that is no file is called what it is, by whatever reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.base.paths import LONGEST_NAME, absent, followed, require_another, require_folder_name
from pgolf_post.base.storage import read_json
from pgolf_post.checkpoint import read_tensors
from pgolf_post.data.tokenizer import load_tokenizer
from pgolf_post.errors import DamagedFileError, NotFoundError, SettingsError
from pgolf_post.importers.foreign_file import read_foreign
from pgolf_post.importers.log_file import read_log
from pgolf_post.importers.repack import read_foreign_artifact
from pgolf_post.ledger.tables import read_tables
from pgolf_post.pack.payload import read_script
from pgolf_post.settings import read_toml


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder with a link to nothing, a folder and a pipe."""
    (tmp_path / "link").symlink_to("/mnt/away/file")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_a_path_is_called_what_it_is(places: Path) -> None:
    assert absent(places / "link") == f"{places}/link is a link to /mnt/away/file, which is not there"
    assert absent(places / "folder") == f"{places}/folder is a folder, not a file"
    assert absent(places / "pipe").startswith(f"{places}/pipe is a pipe or a device, not a file; copy")
    assert absent(places / "nothing", "log") == f"no such log: {places}/nothing"


def test_links_are_followed_to_what_is_there(places: Path) -> None:
    (places / "good").symlink_to("folder")
    (places / "loop").symlink_to("loop")
    assert followed(places / "good") == (places / "folder").resolve()
    assert followed(places / "nothing") == places / "nothing"
    for name in ("link", "loop"):
        with pytest.raises(NotFoundError, match="which is not there"):
            followed(places / name)


def test_what_is_read_is_not_replaced(places: Path) -> None:
    (places / "script.py").write_text("print(1)")
    (places / "same.py").symlink_to("script.py")
    require_another(places / "new.py", places / "script.py")
    for out in ("script.py", "same.py"):
        with pytest.raises(SettingsError, match="it would be replaced"):
            require_another(places / out, places / "script.py")


READERS: tuple[Callable[[Path], Any], ...] = (
    read_json, read_tensors, load_tokenizer, read_foreign, read_log, read_foreign_artifact, read_tables, read_script,
    read_toml,
)  # fmt: skip


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_reader_says_so(read: Callable[[Path], Any], places: Path) -> None:
    with pytest.raises(NotFoundError, match="is a link to /mnt/away/file, which is not there"):
        read(places / "link")
    with pytest.raises(NotFoundError, match="is a folder, not a file"):
        read(places / "folder")


@pytest.mark.parametrize(
    "content", ["9" * 5000, "[" * 100_000, "\ufeff{}", "{}}"], ids=["digits", "depth", "mark", "end"]
)
def test_json_that_no_reader_takes_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "meta.json").write_text(content, encoding="utf-8")
    with pytest.raises(DamagedFileError, match=r"meta\.json is not valid JSON"):
        read_json(tmp_path / "meta.json")


def test_a_name_that_no_file_system_takes_is_refused_before_anything_is_made() -> None:
    assert require_folder_name("é" * (LONGEST_NAME // 2))
    with pytest.raises(SettingsError, match=r"--name ééé.*… has 202 bytes; a folder's name has at most 200"):
        require_folder_name("é" * (LONGEST_NAME // 2 + 1))
