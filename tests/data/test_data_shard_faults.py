"""Shard folders in the states that people report: adopted whole, or refused by name with a command that mends it."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from printed_command import run_printed, run_python_here

from pgolf_post.data import DataFolder, read_shard, write_shard
from pgolf_post.data.adopt import adopt
from pgolf_post.data.check import check
from pgolf_post.data.shard_names import find_shards
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, PgolfError

VAL, TRAIN = "fineweb_val_000000.bin", "fineweb_train_000000.bin"

Fault = Callable[[Path], object]


@pytest.fixture
def shards(built: DataFolder, tmp_path: Path) -> Path:
    """One training and one validation shard, as another program would leave them."""
    folder = tmp_path / "my shards"  # hints quote it
    folder.mkdir()
    for name in (VAL, TRAIN):
        (folder / name).write_bytes((built.path / name).read_bytes())
    return folder


def adopted(shards: Path, built: DataFolder) -> DataFolder:
    return adopt(shards, built.path / "tokenizer.model", shards.parent / "adopted", "mine")


def shard_bytes(tokens: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + tokens.astype(dtype).tobytes()


def change(name: str, new: Callable[[bytes], bytes]) -> Fault:
    return lambda folder: (folder / name).write_bytes(new((folder / name).read_bytes()))


def change_tokens(name: str, new: Callable[[np.ndarray], np.ndarray]) -> Fault:
    return lambda folder: write_shard(folder / name, new(np.array(read_shard(folder / name))))


def add(name: str, content: bytes) -> Fault:
    return lambda folder: (folder / name).write_bytes(content)


def rename(old: str, new: str) -> Fault:
    return lambda folder: (folder / old).rename(folder / new)


def tokens_of(content: bytes) -> np.ndarray:
    return np.frombuffer(content[1024:], "<u2")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 200001024\n"

REFUSED: dict[str, tuple[Fault, type[PgolfError], str, str]] = {  # what is done, error, words, words of the hint
    "truncated": (change(VAL, lambda b: b[: len(b) // 2]), DamagedFileError, "it is cut off", "fetch it again"),
    "odd bytes": (change(VAL, lambda b: b[:-1]), DamagedFileError, "it is cut off", "fetch it again"),
    "something behind": (change(VAL, lambda b: b + b"ab"), DamagedFileError, "stands behind its tokens", "fetch"),
    "32 bits": (
        change(VAL, lambda b: shard_bytes(tokens_of(b), 20240801, 7, "<u4")),
        DamagedFileError, "magic 20240801 version 7, .*32-bit tokens", "data build TEXT --tokenizer",
    ),
    "other version": (change(VAL, lambda b: shard_bytes(tokens_of(b), version=2)), DamagedFileError, "version 2", "1"),
    "empty file": (add(VAL, b""), DamagedFileError, "is empty", "fetch it again"),
    "half a header": (change(VAL, lambda b: b[:700]), DamagedFileError, "700 bytes, shorter than", "fetch"),
    "negative count": (
        change(VAL, lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:]), DamagedFileError, "promises -1 tokens", "fetch",
    ),
    "git lfs": (add(TRAIN, LFS), DamagedFileError, "000.bin is a Git LFS pointer", "lfs pull"),
    "html": (add(VAL, b"\n<!DOCTYPE html><title>Sign in"), DamagedFileError, "is an HTML page", "fetch"),
    "parquet": (add(VAL, b"PAR1" + bytes(2000)), DamagedFileError, "is a parquet file", "data build"),
    "no tokens": (change_tokens(VAL, lambda t: t[:0]), MismatchError, "has no tokens", "fetch"),
    "begins inside": (change_tokens(VAL, lambda t: t[5:]), MismatchError, r"not with BOS \(1\).* is cut", "before it"),
    "no BOS": (change_tokens(TRAIN, lambda t: t[t != 1]), MismatchError, "no token is BOS", "data build"),
    "never filled": (
        change_tokens(TRAIN, lambda t: np.concatenate([t[:5000], np.zeros_like(t[5000:])])),
        DamagedFileError, "stretches of zeros, the first at position 5120", "sha256",
    ),
    "id too large": (
        change_tokens(VAL, lambda t: np.where(np.arange(len(t)) == 777, 5000, t)),
        MismatchError, r"my shards/fineweb_val_000000\.bin: token id 5000 at position 777", "--tokenizer FILE.model",
    ),
    "short sidecar": (
        add("fineweb_val_bytes_000000.bin", shard_bytes(np.ones(100))),
        MismatchError, "my shards/fineweb_val_bytes_000000.bin: the shard has .* its byte sidecar 100", "one version",
    ),
    "browser's copy": (
        lambda folder: add("fineweb_val_000000 (1).bin", (folder / VAL).read_bytes())(folder),
        MismatchError, r"fineweb_val_000000 \(1\)\.bin: not named like a shard", "mv '.*val_000000 \\(1\\).bin'",
    ),
    "equal shards": (
        lambda folder: add("fineweb_val_000001.bin", (folder / VAL).read_bytes())(folder),
        MismatchError, "val_000001.bin has the same tokens as fineweb_val_000000.bin", "mv .*000001.bin'.copy",
    ),
    "validation in training": (
        lambda folder: add("fineweb_train_000001.bin", (folder / VAL).read_bytes())(folder),
        MismatchError, "has the same tokens as", "mv ",
    ),
    "one number twice": (
        lambda folder: add("fineweb_val_0.bin", (folder / TRAIN).read_bytes())(folder),
        MismatchError, "two val shards with number 0", "move one",
    ),
    "gap in validation": (
        lambda folder: add("fineweb_val_000002.bin", (folder / TRAIN).read_bytes())(folder),
        MismatchError, "lacks fineweb_val_000001.bin: a score needs the whole", "fetch what is missing",
    ),
    "unfinished": (add("fineweb_train_000001.bin.incomplete", b"x"), DamagedFileError, "not finished", "finish"),
    "unfinished beside": (add(VAL + ".aria2", b"x"), DamagedFileError, "not finished: fineweb_val_.*aria2", "finish"),
    "dangling": (
        lambda folder: (folder / "fineweb_train_000001.bin").symlink_to("/nowhere/blob"),
        NotFoundError, "train_000001.bin is a link to /nowhere/blob, which is not there", "cp -L",
    ),
    "only training": (
        lambda folder: (folder / VAL).unlink(), NotFoundError, "only training shards", "copy the validation shards",
    ),
    "other names": (
        lambda folder: (rename(VAL, "edu_val_0.bin")(folder), rename(TRAIN, "edu_train_1.bin")(folder)),
        NotFoundError, "the .bin files there are edu_train_1.bin, edu_val_0.bin", "mv .*edu_val_0.bin.*val_000000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_fault_is_refused_by_name_and_nothing_is_left(name: str, shards: Path, built: DataFolder) -> None:
    fault, kind, words, hint_words = REFUSED[name]
    fault(shards)
    with pytest.raises(kind, match=words) as caught:
        adopted(shards, built)
    assert re.search(hint_words, caught.value.hint or "")
    assert "adopted" not in f"{caught.value} {caught.value.hint}"
    assert not (shards.parent / "adopted").exists()


MENDED: dict[str, Callable[[bytes], bytes]] = {
    "padded": lambda content: content + bytes(512),
    "gzip": gzip.compress,
    "no header": lambda content: content[1024:],
    "big-endian": lambda content: (
        np.frombuffer(content[:1024], "<i4").astype(">i4").tobytes() + tokens_of(content).astype(">u2").tobytes()
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_the_printed_command_mends_the_shard(
    name: str, shards: Path, built: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = (shards / VAL).read_bytes()
    (shards / VAL).write_bytes(MENDED[name](original))
    with pytest.raises(DamagedFileError) as caught:
        adopted(shards, built)
    if " -c " in (caught.value.hint or ""):
        run_python_here(caught.value.hint, monkeypatch)
    else:
        run_printed(caught.value.hint, shards.parent)
    assert (shards / VAL).read_bytes() == original
    assert adopted(shards, built).manifest["splits"]["val"] == built.manifest["splits"]["val"]


def test_other_files_and_links_are_no_fault(shards: Path, built: DataFolder, tmp_path: Path) -> None:
    (shards / f"._{VAL}").write_bytes(b"\0\5\x16\7" + bytes(100))  # macOS
    (shards / f"{TRAIN}.sha256").write_text("…")
    (tmp_path / "blob").write_bytes((shards / VAL).read_bytes())
    (shards / VAL).unlink()
    (shards / VAL).symlink_to(tmp_path / "blob")
    folder = adopted(shards, built)
    assert folder.manifest["splits"]["val"] == built.manifest["splits"]["val"]
    assert not (folder.path / VAL).is_symlink()
    assert all(row.passed for row in check(folder))


def test_training_shards_from_the_middle_are_taken_aloud(
    shards: Path, built: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = np.array(read_shard(shards / TRAIN))
    (shards / TRAIN).unlink()
    write_shard(shards / "fineweb_train_000009.bin", tokens[3:9000])
    write_shard(shards / "fineweb_train_000011.bin", tokens[9000:])
    assert find_shards(shards).train == ["fineweb_train_000009.bin", "fineweb_train_000011.bin"]
    folder = adopted(shards, built)
    said = capsys.readouterr().err
    assert "lacks fineweb_train_000010.bin: it trains on the others" in said
    assert "the document before its first BOS is cut" in said
    assert all(row.passed for row in check(folder))
