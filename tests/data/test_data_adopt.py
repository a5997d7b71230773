"""Adopting shards: the manifest that results states what a build of the same text states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pgolf_post.data import DataFolder, read_shard, write_shard
from pgolf_post.data.adopt import adopt
from pgolf_post.data.check import check
from pgolf_post.errors import MismatchError, NotFoundError, PgolfError


def shards_of(folder: DataFolder, out: Path) -> Path:
    """A folder with the shards alone, as another program would leave them."""
    out.mkdir()
    for path in folder.path.glob("fineweb_*.bin"):
        (out / path.name).write_bytes(path.read_bytes())
    return out


def test_adopted_shards_are_counted_like_built_ones(built: DataFolder, tmp_path: Path) -> None:
    tokenizer = built.path / "tokenizer.model"
    adopted = adopt(shards_of(built, tmp_path / "shards"), tokenizer, tmp_path / "adopted", "mine")
    assert adopted.manifest["splits"] == built.manifest["splits"]
    assert adopted.manifest["tokenizer"] == built.manifest["tokenizer"]
    assert all(row.passed for row in check(adopted))


def test_shards_of_another_tokenizer_are_refused_and_nothing_is_left(built: DataFolder, tmp_path: Path) -> None:
    shards = shards_of(built, tmp_path / "shards")
    path = next(shards.glob("fineweb_val_*.bin"))
    tokens = np.array(read_shard(path))
    tokens[3] = 60_000
    write_shard(path, tokens)
    with pytest.raises(MismatchError, match="token id 60000 at position 3"):
        adopt(shards, built.path / "tokenizer.model", tmp_path / "adopted", "mine")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["shards"]


def test_a_folder_without_validation_shards_and_a_taken_destination_are_refused(
    built: DataFolder, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    tokenizer = built.path / "tokenizer.model"
    with pytest.raises(NotFoundError, match=r"no fineweb_val_\*\.bin"):
        adopt(tmp_path / "empty", tokenizer, tmp_path / "adopted", "mine")
    with pytest.raises(PgolfError, match="already exists"):
        adopt(shards_of(built, tmp_path / "shards"), tokenizer, tmp_path / "empty", "mine")


def test_repeated_documents_are_counted(built: DataFolder, tmp_path: Path) -> None:
    tokenizer, shards = built.path / "tokenizer.model", shards_of(built, tmp_path / "shards")
    val = next(shards.glob("fineweb_val_*.bin"))
    tokens = np.array(read_shard(val))
    write_shard(val, np.concatenate([tokens, tokens]))
    num_val = int(np.count_nonzero(tokens == 1))
    train = max(shards.glob("fineweb_train_*.bin"))
    write_shard(train, np.concatenate([np.array(read_shard(train)), tokens]))
    source = adopt(shards, tokenizer, tmp_path / "adopted", "mine").manifest["source"]
    assert (source["repeated_val_documents"], source["val_documents_in_train"]) == (num_val, 2 * num_val)
