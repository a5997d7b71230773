"""`data check`: a good folder passes, and each planted fault is found by the row that is about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pgolf_post.base.storage import sha256_file, write_json
from pgolf_post.cli.data import command
from pgolf_post.data.challenge import challenge_note, challenge_verdict
from pgolf_post.data.check import check
from pgolf_post.data.folder import DataFolder
from pgolf_post.data.shard_kinds import HEADER_BYTES
from pgolf_post.data.shards import read_shard, write_shard
from pgolf_post.errors import VerificationError

VAL_SHARD = "fineweb_val_000000.bin"


@pytest.fixture
def folder(built: DataFolder, tmp_path: Path) -> DataFolder:
    """A copy that a test may damage."""
    shutil.copytree(built.path, tmp_path / "copy")
    return DataFolder.open(tmp_path / "copy")


def failed(folder: DataFolder) -> set[str]:
    return {row.name for row in check(DataFolder.open(folder.path)) if not row.passed}


def rewrite(folder: DataFolder, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads(json.dumps(folder.manifest))
    change(manifest)
    write_json(folder.path / "manifest.json", manifest)


def replace_val(folder: DataFolder, tokens: np.ndarray) -> None:
    """Write other tokens and a manifest whose checksum and length agree with them."""
    write_shard(folder.path / VAL_SHARD, tokens)
    entry = {"file": VAL_SHARD, "sha256": sha256_file(folder.path / VAL_SHARD), "num_tokens": len(tokens)}
    rewrite(folder, lambda manifest: manifest["splits"]["val"].update(shards=[entry], num_tokens=len(tokens)))


def test_a_good_folder_passes(built: DataFolder) -> None:
    rows = check(built)
    assert [row for row in rows if not row.passed] == []
    assert len(rows) == 15


def test_flipped_shard_byte(folder: DataFolder) -> None:
    path = folder.path / VAL_SHARD
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 100] ^= 1
    path.write_bytes(data)
    assert "val: sha256" in failed(folder)


def test_wrong_checksums(folder: DataFolder) -> None:
    rewrite(folder, lambda manifest: manifest["tokenizer"].update(sha256="0" * 64))
    assert failed(folder) == {"tokenizer: sha256, vocabulary"}
    rewrite(folder, lambda manifest: manifest["splits"]["val"]["shards"][0].update(sha256="0" * 64))
    assert failed(folder) == {"val: sha256"}


def test_truncated_shard(folder: DataFolder) -> None:
    path = folder.path / VAL_SHARD
    path.write_bytes(path.read_bytes()[:-2])
    assert {"val: sha256", "val: headers, lengths"} <= failed(folder)


def test_a_shard_that_stands_twice(folder: DataFolder) -> None:
    entry = folder.manifest["splits"]["val"]["shards"][0]
    copy = {**entry, "file": "fineweb_val_000001.bin"}
    shutil.copyfile(folder.path / VAL_SHARD, folder.path / copy["file"])
    rewrite(folder, lambda manifest: manifest["splits"]["val"].update(shards=[entry, copy]))
    assert "val: no shard twice" in failed(folder)
    rewrite(folder, lambda manifest: manifest["splits"]["train"].update(shards=[entry]))
    assert "val: no shard twice" in failed(folder)


def test_a_shard_that_was_never_filled(folder: DataFolder) -> None:
    tokens = np.array(read_shard(folder.path / VAL_SHARD))
    tokens[-3000:] = 0
    replace_val(folder, tokens)
    assert "val: token ids" in failed(folder)


def test_missing_bos(folder: DataFolder) -> None:
    replace_val(folder, np.asarray(read_shard(folder.path / VAL_SHARD))[1:])
    assert "val: documents open with BOS" in failed(folder)


def test_token_outside_the_vocabulary(folder: DataFolder) -> None:
    tokens = np.array(read_shard(folder.path / VAL_SHARD))
    tokens[5] = folder.vocab_size
    replace_val(folder, tokens)
    assert "val: token ids" in failed(folder)


def test_doubled_leading_space(folder: DataFolder) -> None:
    table = folder.byte_table
    doubled = replace(table, piece_bytes=table.piece_bytes + table.has_leading_space)
    folder.__dict__["byte_table"] = doubled
    names = {row.name for row in check(folder) if not row.passed}
    assert {"val: byte table = decoder", "val: bytes of text", "train: byte table = decoder"} <= names


def test_wrong_number_of_bytes(folder: DataFolder) -> None:
    rewrite(folder, lambda manifest: manifest["splits"]["val"].update(num_bytes=1))
    assert failed(folder) == {"val: bytes of text"}


@pytest.mark.parametrize("position", [0, 7])
def test_sidecar_that_does_not_add_up(folder: DataFolder, position: int) -> None:
    tokens = np.asarray(read_shard(folder.path / VAL_SHARD))
    entries = folder.token_bytes("val", tokens)
    entries[position] += 1
    path = folder.path / "fineweb_val_bytes_000000.bin"
    write_shard(path, entries)
    sidecar = {"file": path.name, "sha256": sha256_file(path), "num_tokens": len(entries)}
    rewrite(folder, lambda manifest: manifest["splits"]["val"].update(byte_sidecars=[sidecar]))
    assert "val: byte sidecar" in failed(folder)


@pytest.mark.parametrize(
    ("vocab_size", "num_tokens", "num_bytes", "passed", "says"),
    [
        (1024, 62_021_846, 151_080_891, True, "SP1024"),
        (8192, 40_540_160, 151_078_222, True, "SP8192"),
        (8192, 40_540_160, 176_330_000, False, "leading space of each piece was counted twice"),
        (8192, 47_851_520, 164_590_000, False, "case sentinels"),
        (4096, 45_508_608, 150_000_000, False, "SP4096 validation has 151.07"),
    ],
)
def test_the_challenges_splits(vocab_size: int, num_tokens: int, num_bytes: int, passed: bool, says: str) -> None:
    verdict = challenge_verdict(vocab_size, num_tokens, num_bytes)
    assert verdict is not None
    assert verdict[0] is passed
    assert says in verdict[1]


def test_other_splits_are_not_the_challenges() -> None:
    assert challenge_verdict(1024, 62_000_000, 1) is None
    assert challenge_verdict(512, 62_021_846, 1) is None
    assert challenge_note(512, 9000) is None
    assert challenge_note(1024, 62_021_846) is None
    assert "9,000 tokens, SP1024 has 62,021,632" in str(challenge_note(1024, 9000))


def test_command_line(folder: DataFolder) -> None:
    runner = CliRunner()
    good = runner.invoke(command, ["check", str(folder.path), "--json"], catch_exceptions=False)
    assert json.loads(good.stdout.splitlines()[-1])["passed"] is True
    rewrite(folder, lambda manifest: manifest["splits"]["val"].update(num_bytes=1))
    bad = runner.invoke(command, ["check", str(folder.path), "--json"])
    assert isinstance(bad.exception, VerificationError)
    assert bad.exception.exit_code == 4
    assert "val: bytes of text" in str(bad.exception)
    assert json.loads(bad.stdout.splitlines()[-1])["passed"] is False
