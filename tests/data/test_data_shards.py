"""Shards: what is written is read, and what is not a shard is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pgolf_post.data.folder import check_token_ids
from pgolf_post.data.shard_kinds import HEADER_BYTES, MAGIC, VERSION
from pgolf_post.data.shards import read_shard, write_shard
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, PgolfError

ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)


@ONE_FOLDER
@given(tokens=arrays(np.uint16, st.integers(0, 300)))
def test_round_trip(tmp_path: Path, tokens: np.ndarray) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, tokens)
    assert np.array_equal(read_shard(path), tokens)
    assert path.stat().st_size == HEADER_BYTES + 2 * len(tokens)
    assert list(np.fromfile(path, dtype="<i4", count=3)) == [MAGIC, VERSION, len(tokens)]


@pytest.mark.parametrize("change_bytes", [-1, -2, -2000, 1, 2])
def test_wrong_length_is_refused(tmp_path: Path, change_bytes: int) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(100))
    data = path.read_bytes()
    path.write_bytes(data[:change_bytes] if change_bytes < 0 else data + bytes(change_bytes))
    with pytest.raises(DamagedFileError, match=r"a\.bin"):
        read_shard(path)


@pytest.mark.parametrize(("index", "value"), [(0, MAGIC + 1), (1, VERSION + 1), (2, 99), (2, 101), (2, -1)])
def test_wrong_header_is_refused(tmp_path: Path, index: int, value: int) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(100))
    header = np.fromfile(path, dtype="<i4", count=256)
    header[index] = value
    path.write_bytes(header.tobytes() + path.read_bytes()[HEADER_BYTES:])
    with pytest.raises(DamagedFileError, match=str(value)):
        read_shard(path)


def test_missing_and_unwritable_values(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.bin"):
        read_shard(tmp_path / "none.bin")
    for values in (np.array([65536]), np.array([-1]), np.zeros((2, 2))):
        with pytest.raises(PgolfError):
            write_shard(tmp_path / "a.bin", values)
    assert list(tmp_path.iterdir()) == []


def test_token_outside_the_vocabulary_is_named() -> None:
    tokens = np.array([1, 5, 7, 400, 2], dtype=np.uint16)
    check_token_ids(tokens, 401, Path("s.bin"))
    with pytest.raises(MismatchError, match=r"s\.bin: token id 400 at position 3, but the vocabulary has 400"):
        check_token_ids(tokens, 400, Path("s.bin"))
