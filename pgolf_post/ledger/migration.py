"""The table of a ledger's file: created, and brought from an older version to the present one.

A file's version is its `PRAGMA user_version`; 0 is an empty file. Each column says since which version it exists
(schema.py), so migrating is adding those that are younger than the file. No row is rewritten: SQLite reads an added
column as NULL, and the store reads NULL as the column's default.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from pgolf_post.ledger.schema import Column


def latest_version(columns: Sequence[Column]) -> int:
    """Return the version of a file that has all these columns."""
    return max(column.since for column in columns)


def file_version(connection: sqlite3.Connection) -> int:
    """Return the version of an open file; 0 if it is empty."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection, columns: Sequence[Column]) -> None:
    """Create the table, or add the columns that the file is too old to have. To be called inside a transaction."""
    version, latest = file_version(connection), latest_version(columns)
    if version == 0:
        connection.execute(f"CREATE TABLE rows ({', '.join(map(_definition, columns))}, PRIMARY KEY (kind, id))")
    else:
        for column in columns:
            if column.since > version:
                connection.execute(f"ALTER TABLE rows ADD COLUMN {_definition(column)}")
    if version < latest:
        connection.execute(f"PRAGMA user_version = {latest}")


def _definition(column: Column) -> str:
    return f'"{column.name}" {column.sql}'  # quoted: one of them, commit, is a word of SQL
