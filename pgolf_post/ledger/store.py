"""The ledger's file: one SQLite database in WAL mode beside the checkpoints, written by any number of processes.

Every write is one transaction that takes the write lock before it reads (`BEGIN IMMEDIATE`), so that two writers wait
for each other instead of overwriting each other, and a killed one leaves nothing. Readers never wait. Where the folder
cannot be written, an existing ledger is still read.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, PgolfError
from pgolf_post.ledger.query import matches
from pgolf_post.ledger.schema import Row, Verdict

LEDGER_FILE = "ledger.sqlite"
SCHEMA_VERSION = 1
BUSY_SECONDS = 60.0  # a writer waits so long for the others
JSON_COLUMNS = ("parents", "settings", "result")
COLUMNS = tuple(column.name for column in fields(Row))
QUOTED = ", ".join(f'"{column}"' for column in COLUMNS)  # one of them, commit, is a word of SQL
NUMERIC_COLUMNS = ("seconds", "cost_dollars")
CREATE = f"""
CREATE TABLE IF NOT EXISTS rows (
    {", ".join(f'"{column}" {"REAL" if column in NUMERIC_COLUMNS else "TEXT"}' for column in COLUMNS)},
    PRIMARY KEY (kind, id)
)
"""
UPSERT = f"INSERT OR REPLACE INTO rows ({QUOTED}) VALUES ({', '.join('?' for _ in COLUMNS)})"


class Ledger:
    """An open ledger. One connection, for one thread of one process: a forked or spawned worker opens its own."""

    def __init__(self, path: Path, connection: sqlite3.Connection, read_only: bool) -> None:
        self.path, self.read_only = path, read_only
        self._connection = connection

    @classmethod
    def open(cls, root: Path, read_only: bool = False) -> Self:
        """The ledger of a checkpoint root, created if missing (with `read_only`, NotFoundError instead).

        Raises DamagedFileError if the file is no ledger or of another version, PgolfError if it cannot be written.
        """
        path = root / LEDGER_FILE
        with _explained(path):
            if read_only:
                ledger = cls(path, _connect_read_only(path), True)
            else:
                root.mkdir(parents=True, exist_ok=True)
                ledger = cls(path, sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None), False)
            try:
                ledger._check_version()
            except BaseException:
                ledger.close()
                raise
        return ledger

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_version(self) -> None:
        if not self.read_only and self._version() == 0:
            self._create()
        if self._version() != SCHEMA_VERSION:
            raise DamagedFileError(
                f"{self.path} has ledger version {self._version()}, this program reads {SCHEMA_VERSION}",
                hint="use the program that wrote it: pgolf-post ledger export --format jsonl, then import here",
            )

    def _version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def _create(self) -> None:
        _set_wal(self._connection)
        with self._transaction():
            if self._version() == 0:  # else another process came first
                self._connection.execute(CREATE)
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, with the write lock held from the start."""
        with _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def add(self, row: Row, replace: bool = False) -> bool:
        """Keep a row; False if it is there already with the same content (or was replaced).

        Raises MismatchError if `(kind, id)` is there with other content, unless `replace`. What `note` said of a row
        outlives its replacement.
        """
        with self._transaction():
            return self._add(row, replace)

    def add_all(self, rows: list[Row], replace: bool = False) -> int:
        """`add` of many rows in one transaction: all or none. Returns how many were new."""
        with self._transaction():
            return sum(self._add(row, replace) for row in rows)

    def complete(self, row: Row) -> bool:
        """Keep a row, or give the one that is there what it did not know. True if it was new.

        Its result gains and renews keys, its seconds are renewed; commit, device and cost stay where known, and name,
        parents, settings and conclusion as they are. For facts read from disk, of which one command sees more than
        another.
        """
        with self._transaction():
            return self._complete(row)

    def complete_all(self, rows: list[Row]) -> list[bool]:
        """`complete` of many rows in one transaction: all or none."""
        with self._transaction():
            return [self._complete(row) for row in rows]

    def _complete(self, row: Row) -> bool:
        known = self._get(row.kind, row.id)
        if known is None:
            return self._add(row, False)
        first = {name: getattr(known, name) or getattr(row, name) for name in ("commit", "device", "cost_dollars")}
        seconds = known.seconds if row.seconds is None else row.seconds
        completed = replace(known, result={**known.result, **row.result}, seconds=seconds, **first)
        if completed != known:
            self._write(completed)
        return False

    def _add(self, row: Row, replace_it: bool) -> bool:
        known = self._get(row.kind, row.id)
        if known is None:
            self._write(row)
            return True
        if known.content() != row.content():
            if not replace_it:
                raise MismatchError(_conflict(known, row), hint="say that the new one counts: replace=True / --replace")
            self._write(_replaced(known, row))
        return False

    def _write(self, row: Row) -> None:
        values = [getattr(row, column) for column in COLUMNS]
        packed = [json.dumps(v) if column in JSON_COLUMNS else v for column, v in zip(COLUMNS, values, strict=True)]
        self._connection.execute(UPSERT, packed)

    def get(self, kind: str, id: str) -> Row | None:
        """The row of exactly this kind and id."""
        with _explained(self.path):
            return self._get(kind, id)

    def _get(self, kind: str, id: str) -> Row | None:
        found = self._select("WHERE kind = ? AND id = ?", (kind, id))
        return found[0] if found else None

    def rows(
        self, kind: str | None = None, *, run: str | None = None, where: Mapping[str, Any] | None = None
    ) -> list[Row]:
        """Rows in the order they were created; `where` maps columns or (dotted) keys of settings and result to values.

        See `pgolf_post.ledger.query.matches`.
        """
        wanted = {"kind": kind, "run": run}
        given = {column: value for column, value in wanted.items() if value is not None}
        clause = " AND ".join(f"{column} = ?" for column in given)
        with _explained(self.path):
            found = self._select(f"WHERE {clause}" if clause else "", tuple(given.values()))
        return [row for row in found if matches(row, where or {})]

    def find(self, prefix: str, kind: str | None = None) -> Row:
        """The one row (of a kind) whose id, or else whose name, is or else begins with `prefix`.

        Raises NotFoundError if there is none, MismatchError listing them if there are several.
        """
        rows = [row for row in self.rows(kind) if row.kind != "note"] if prefix else []
        found = [row for row in rows if row.id == prefix] or [row for row in rows if row.id.startswith(prefix)]
        found = found or [r for r in rows if r.name == prefix] or [r for r in rows if r.name.startswith(prefix)]
        if not found:
            raise NotFoundError(f"{self.path} has no row whose id or name begins with {prefix!r}", hint=LIST_ROWS)
        if len(found) > 1:
            listed = "; ".join(f"{row.kind} {row.id[:16]} {row.name}" for row in found[:20])
            more = f" and {len(found) - 20} more" if len(found) > 20 else ""
            raise MismatchError(f"{prefix!r} is the beginning of {len(found)} rows: {listed}{more}", hint=LIST_ROWS)
        return found[0]

    def note(self, id: str, conclusion: str, verdict: Verdict | None = None, kind: str | None = None) -> None:
        """Write a conclusion on the row with this id (see `find`), and keep it as a row of its own.

        A later note is shown instead of an earlier one; the rows of kind `note` keep both.
        """
        row = self.find(id, kind)
        with self._transaction():
            row = self._get(row.kind, row.id) or row
            number = self._connection.execute("SELECT COUNT(*) FROM rows WHERE kind = 'note'").fetchone()[0]
            said: dict[str, Any] = {"conclusion": conclusion, "verdict": verdict or row.verdict}
            name = f"note on {row.name or row.id[:12]}"
            self._write(Row("note", f"note-{number + 1}", (row.id,), name, row.run, {"kind": row.kind}, **said))
            self._write(replace(row, **said))

    def _select(self, clause: str, values: tuple[Any, ...]) -> list[Row]:
        query = f"SELECT {QUOTED} FROM rows {clause} ORDER BY created, rowid"
        return [_row(found) for found in self._connection.execute(query, values).fetchall()]


LIST_ROWS = "pgolf-post ledger table"


def _row(values: tuple[Any, ...]) -> Row:
    named = dict(zip(COLUMNS, values, strict=True))
    return Row(**named | {column: json.loads(named[column]) for column in JSON_COLUMNS})


def _replaced(known: Row, new: Row) -> Row:
    """The new row, with what was concluded of the old one where the new one concludes nothing."""
    return replace(new, verdict=new.verdict or known.verdict, conclusion=new.conclusion or known.conclusion)


def _conflict(known: Row, new: Row) -> str:
    differ = [name for name in ("parents", "name", "run") if getattr(known, name) != getattr(new, name)]
    for name in ("settings", "result"):
        old, now = getattr(known, name), getattr(new, name)
        keys = sorted(key for key in {*old, *now} if old.get(key) != now.get(key))
        differ += [f"{name}.{key}: {old.get(key)!r} → {now.get(key)!r}" for key in keys]
    return f"the ledger has {known.kind} {known.id[:16]} ({known.name}) already, and otherwise: {'; '.join(differ[:8])}"


def _connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, also where not even the WAL's index file can be made beside the database."""
    if not path.is_file():
        raise NotFoundError(f"no ledger at {path}", hint="pgolf-post ledger scan   (records what is on disk already)")
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
    try:
        connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        pending = path.with_name(f"{path.name}-wal")
        if pending.is_file() and pending.stat().st_size:  # written, but not yet in the main file
            raise
        return sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)
    return connection


def _set_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL mode; the switch does not wait for other connections by itself."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, naming the file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise PgolfError(f"the ledger {path} cannot be used: {error}; nothing was changed in it") from error
    except sqlite3.DatabaseError as error:
        raise DamagedFileError(
            f"{path} is not a ledger or is damaged: {error}",
            hint=f"move it away and record what is on disk again: pgolf-post ledger scan --root {path.parent}",
        ) from error
