"""Older ledgers: opened, migrated all or nothing, and no row of theirs lost or changed.

`version_1.sqlite` was written by the program that had columns of version 1 alone.
"""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from pgolf_post.errors import DamagedFileError, PgolfError, SettingsError
from pgolf_post.ledger import LEDGER_FILE, Ledger, Row
from pgolf_post.ledger.schema import column, columns_of

VERSION_1 = Path(__file__).with_name("version_1.sqlite")
FIRST_COLUMNS = "kind id parents name run settings settings_hash result commit device seconds cost_dollars verdict"
FIRST_COLUMNS += " conclusion created"


@dataclass(frozen=True)
class LaterRow(Row):
    """A row with two columns that this program does not have."""

    reviewer: str | None = column("Who has looked at it.", since=4, default=None)
    tags: tuple[str, ...] = column("Words to find it by.", since=5, is_json=True, default=("untagged",))


class LaterLedger(Ledger):
    row_type = LaterRow


@dataclass(frozen=True)
class BrokenRow(LaterRow):
    second: str | None = column("A column that SQLite cannot add.", sql="TEXT UNIQUE", since=5, default=None)


class BrokenLedger(Ledger):
    row_type = BrokenRow


@pytest.fixture
def old_root(tmp_path: Path) -> Path:
    shutil.copy(VERSION_1, tmp_path / LEDGER_FILE)
    return tmp_path


def table_of(root: Path) -> tuple[int, list[str], list[tuple[Any, ...]]]:
    """A file's version, columns and stored values, without our program."""
    connection = sqlite3.connect(root / LEDGER_FILE)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    columns = [about[1] for about in connection.execute("PRAGMA table_info(rows)")]
    stored = connection.execute("SELECT * FROM rows ORDER BY rowid").fetchall()
    connection.close()
    return version, columns, stored


def test_a_file_of_version_1_is_read_and_written_by_this_program(old_root: Path) -> None:
    with Ledger.open(old_root) as ledger:
        rows = {(row.kind, row.id): row for row in ledger.rows()}
        assert len(rows) == 4
        trial = rows["trial", "t1"]
        assert (trial.parents, trial.settings, trial.result) == (("c0ffee",), {"clip": 12.85}, {"bpb": 1.0801})
        assert (trial.verdict, trial.conclusion, trial.seconds) == ("positive", "λ = 0.1 is better, by 0.001", 12.5)
        assert [row.parents for row in rows.values() if row.kind == "note"] == [("t1",)]
        assert ledger.add(Row("trial", "t3"))
        assert not ledger.add(trial)


def test_missing_columns_are_added_and_no_row_changes(old_root: Path) -> None:
    with Ledger.open(old_root, read_only=True) as ledger:
        before = ledger.rows()
    _, columns, stored = table_of(old_root)
    assert columns == FIRST_COLUMNS.split()
    with LaterLedger.open(old_root) as ledger:
        after = ledger.rows()
        expected = [{**row.facts(), "reviewer": None, "tags": ("untagged",)} for row in before]
        assert [row.facts() for row in after] == expected
        assert all(isinstance(row, LaterRow) for row in after)
        new = LaterRow("trial", "t3", reviewer="Ada", tags=("a", "b"))
        ledger.add(new)
    version, more, stored_now = table_of(old_root)
    assert (version, more) == (5, [*columns, "command", "phases", "reviewer", "tags"])
    assert [values[: len(columns)] for values in stored_now[: len(stored)]] == stored
    with LaterLedger.open(old_root) as ledger:
        again = ledger.get("trial", "t3")
        assert again is not None
        assert (again.facts()["reviewer"], tuple(again.facts()["tags"])) == ("Ada", ("a", "b"))


def test_a_read_only_ledger_is_read_without_being_migrated(old_root: Path) -> None:
    content = (old_root / LEDGER_FILE).read_bytes()
    with LaterLedger.open(old_root, read_only=True) as ledger:
        assert {row.facts()["tags"] for row in ledger.rows()} == {("untagged",)}
    assert (old_root / LEDGER_FILE).read_bytes() == content


def test_a_migration_that_fails_leaves_the_file_as_it_was(old_root: Path) -> None:
    before = table_of(old_root)
    with pytest.raises(PgolfError, match="UNIQUE"):
        BrokenLedger.open(old_root)
    assert table_of(old_root) == before
    with LaterLedger.open(old_root) as ledger:
        assert len(ledger.rows()) == len(before[2])


def test_a_migrated_file_is_refused_by_an_older_program(old_root: Path) -> None:
    LaterLedger.open(old_root).close()
    with pytest.raises(DamagedFileError, match="version 5, this program reads 3"):
        Ledger.open(old_root)


def test_every_field_of_a_row_is_a_described_column() -> None:
    columns = columns_of(Row)
    assert [each.name for each in columns] == [each.name for each in fields(Row)]
    assert [each.name for each in columns if each.since == 1] == FIRST_COLUMNS.split()
    assert all(each.description.endswith(".") for each in columns)


def test_a_later_column_needs_a_default() -> None:
    @dataclass(frozen=True, kw_only=True)
    class WithoutDefault(Row):
        reviewer: str = field(metadata=column("Who.", since=2).metadata)

    with pytest.raises(SettingsError, match="'reviewer' is new in version 2 and needs a default"):
        columns_of(WithoutDefault)
