"""The ledger's file: one SQLite database in WAL mode beside the checkpoints, written by any number of processes.

Every write is one transaction that takes the write lock before it reads (`BEGIN IMMEDIATE`), so that two writers wait
for each other instead of overwriting each other, and a killed one leaves nothing. Readers never wait. Where the folder
cannot be written, an existing ledger is still read.

A file of an older version is migrated when it is opened for writing (migration.py), and read as it is otherwise.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from pgolf_post.base.storage import FREE_SPACE, WRITABLE
from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, PgolfError
from pgolf_post.ledger.later_sync import LaterSync
from pgolf_post.ledger.migration import file_version, latest_version, migrate
from pgolf_post.ledger.query import matches
from pgolf_post.ledger.schema import Column, Row, Verdict, columns_of
from pgolf_post.ledger.waiting import BUSY_SECONDS, QUIET_SECONDS, patiently, writers

LEDGER_FILE = "ledger.sqlite"
HINTS = {  # words of SQLite's → what to do
    "locked": "run this again when that one is done; if it hangs, end it: nothing it has written is lost",
    "disk I/O": FREE_SPACE,  # what SQLite says of a file that may not grow, and of a failing disk
    "full": FREE_SPACE,
    "readonly": WRITABLE,
    "unable to open": WRITABLE,
}
LIST_ROWS = "pgolf-post ledger table"
SCAN = "pgolf-post ledger scan   (records what is on disk already)"
FIRST_KNOWN = ("commit", "device", "cost_dollars", "command")  # stay as they were first known


class Ledger:
    """An open ledger. One connection, for one thread of one process: a forked or spawned worker opens its own."""

    row_type: ClassVar[type[Row]] = Row

    def __init__(self, path: Path, connection: sqlite3.Connection, read_only: bool) -> None:
        self.path, self.read_only = path, read_only
        self._connection = connection
        self._columns = columns_of(self.row_type)  # those that the file has
        self._later: LaterSync | None = None

    @classmethod
    def open(cls, root: Path, read_only: bool = False, flush_later: bool = False) -> Self:
        """Open the ledger of a checkpoint root, created if missing (with `read_only`, NotFoundError instead).

        With `flush_later`, writes do not wait for the disk; a thread flushes them (later_sync.py).
        Raises DamagedFileError if the file is no ledger or of a later version, PgolfError if it cannot be written.
        """
        path = root / LEDGER_FILE
        with _explained(path):
            if read_only:
                ledger = cls(path, _connect_read_only(path), True)
            else:
                root.mkdir(parents=True, exist_ok=True)
                ledger = cls(path, sqlite3.connect(path, timeout=QUIET_SECONDS, isolation_level=None), False)
            try:
                ledger._meet_version()
                if flush_later:
                    ledger._connection.execute("PRAGMA synchronous = NORMAL")
                    ledger._later = LaterSync(path.with_name(f"{path.name}-wal"))
            except BaseException:
                ledger.close()
                raise
        return ledger

    def close(self) -> None:
        try:
            if self._later is not None:
                self._later.close()
        finally:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _meet_version(self) -> None:
        """Bring an older file to the present version; of a read-only one, take the columns that it has."""
        latest, version = latest_version(self._columns), patiently(self.path, lambda: file_version(self._connection))
        if not self.read_only and version < latest:
            if version == 0:
                self._patiently("PRAGMA journal_mode = WAL")
            with self._transaction():
                migrate(self._connection, self._columns)  # reads the version again: another process may have been first
            version = file_version(self._connection)
        if version == 0 and not self._patiently("SELECT count(*) FROM sqlite_master")[0][0]:
            raise NotFoundError(f"no ledger at {self.path}: the file is empty", hint=SCAN)  # a full disk leaves one
        if not 0 < version <= latest:
            raise DamagedFileError(
                f"{self.path} has ledger version {version}, this program reads {latest}",
                hint="use the program that wrote it: pgolf-post ledger export --format jsonl, then import here",
            )
        self._columns = tuple(column for column in self._columns if column.since <= version)

    def _patiently(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Run a statement, as soon as no other process is in the way, and return its rows."""
        return patiently(self.path, lambda: self._connection.execute(statement, values).fetchall())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Run a block as one transaction, all or nothing, with the write lock held from the start."""
        with _explained(self.path):
            self._patiently("BEGIN IMMEDIATE")
            try:
                yield
                self._patiently("COMMIT")
                if self._later is not None:
                    self._later.due()
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def add(self, row: Row, replace: bool = False) -> bool:
        """Keep a row; return False if it is there already with the same content (or was replaced).

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
        """Keep a row, or fill in what the row that is there lacks. Return True if it was new.

        Its result gains and renews keys, its seconds and phases are renewed; commit, device, cost and command stay
        where known, and name, parents, settings and conclusion as they are. For facts read from disk, of which one
        command sees more than another.
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
        first = {name: getattr(known, name) or getattr(row, name) for name in FIRST_KNOWN}
        seconds = known.seconds if row.seconds is None else row.seconds
        result, phases = {**known.result, **row.result}, row.phases or known.phases
        completed = replace(known, result=result, seconds=seconds, phases=phases, **first)
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
        values = [_stored(column, getattr(row, column.name)) for column in self._columns]
        places = ", ".join("?" for _ in values)
        self._connection.execute(f"INSERT OR REPLACE INTO rows ({self._names}) VALUES ({places})", values)

    @property
    def _names(self) -> str:
        return ", ".join(f'"{column.name}"' for column in self._columns)

    def ids(self, kind: str) -> set[str]:
        """Return the ids of all rows of a kind: cheap, to see what is new."""
        with _explained(self.path):
            return {stored[0] for stored in self._patiently("SELECT id FROM rows WHERE kind = ?", (kind,))}

    def get(self, kind: str, id: str) -> Row | None:
        """Return the row of exactly this kind and id, or None."""
        with _explained(self.path):
            return self._get(kind, id)

    def _get(self, kind: str, id: str) -> Row | None:
        rows = self._select("WHERE kind = ? AND id = ?", (kind, id))
        return rows[0] if rows else None

    def rows(
        self, kind: str | None = None, *, run: str | None = None, where: Mapping[str, Any] | None = None
    ) -> list[Row]:
        """Return rows in the order they were created; `where`: column or (dotted) key of settings or result → value.

        See `pgolf_post.ledger.query.matches`.
        """
        wanted = {"kind": kind, "run": run}
        given = {column: value for column, value in wanted.items() if value is not None}
        clause = " AND ".join(f"{column} = ?" for column in given)
        with _explained(self.path):
            rows = self._select(f"WHERE {clause}" if clause else "", tuple(given.values()))
        return [row for row in rows if matches(row, where or {})]

    def find(self, prefix: str, kind: str | None = None) -> Row:
        """Return the one row (of a kind) whose id, or else whose name, is or else begins with `prefix`.

        Raises NotFoundError if there is none, MismatchError listing them if there are several.
        """
        rows = [row for row in self.rows(kind) if row.kind != "note"] if prefix else []
        fitting = [row for row in rows if row.id == prefix] or [row for row in rows if row.id.startswith(prefix)]
        fitting = fitting or [r for r in rows if r.name == prefix] or [r for r in rows if r.name.startswith(prefix)]
        if not fitting:
            raise NotFoundError(f"{self.path} has no row whose id or name begins with {prefix!r}", hint=LIST_ROWS)
        if len(fitting) > 1:
            listed = "; ".join(f"{row.kind} {row.id[:16]} {row.name}" for row in fitting[:20])
            more = f" and {len(fitting) - 20} more" if len(fitting) > 20 else ""
            raise MismatchError(f"{prefix!r} is the beginning of {len(fitting)} rows: {listed}{more}", hint=LIST_ROWS)
        return fitting[0]

    def note(self, id: str, conclusion: str, verdict: Verdict | None = None, kind: str | None = None) -> None:
        """Write a conclusion on the row with this id (see `find`), and keep it as a row of its own.

        A later note is shown instead of an earlier one; the rows of kind `note` keep both.
        """
        row = self.find(id, kind)
        with self._transaction():
            row = self._get(row.kind, row.id) or row
            number = self._patiently("SELECT COUNT(*) FROM rows WHERE kind = 'note'")[0][0]
            said: dict[str, Any] = {"conclusion": conclusion, "verdict": verdict or row.verdict}
            name = f"note on {row.name or row.id[:12]}"
            self._write(Row("note", f"note-{number + 1}", (row.id,), name, row.run, {"kind": row.kind}, **said))
            self._write(replace(row, **said))

    def _select(self, clause: str, values: tuple[Any, ...]) -> list[Row]:
        query = f"SELECT {self._names} FROM rows {clause} ORDER BY created, rowid"
        return [self._row(stored) for stored in self._patiently(query, values)]

    def _row(self, stored: tuple[Any, ...]) -> Row:
        """Return a row as it was written; a NULL is the column's default."""
        named = {
            column.name: json.loads(value) if column.is_json else value
            for column, value in zip(self._columns, stored, strict=True)
            if value is not None or not column.has_default
        }
        return self.row_type(**named)


def _stored(column: Column, value: object) -> object:
    return json.dumps(value) if column.is_json else value


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
        raise NotFoundError(f"no ledger at {path}", hint=SCAN)
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=QUIET_SECONDS)
    try:
        patiently(path, lambda: connection.execute("PRAGMA user_version").fetchone())
    except sqlite3.OperationalError:
        connection.close()
        pending = path.with_name(f"{path.name}-wal")
        if pending.is_file() and pending.stat().st_size:  # written, but not yet in the main file
            raise
        return sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)
    return connection


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's errors as ours, naming the file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        hint = next((hint for words, hint in HINTS.items() if words in str(error)), None)
        why = str(error)
        if "locked" in why:
            why = f"{writers(path)} has been writing to it for {BUSY_SECONDS:.0f} s"
        raise PgolfError(f"the ledger {path} cannot be used: {why}; nothing was changed in it", hint=hint) from error
    except sqlite3.DatabaseError as error:
        raise DamagedFileError(
            f"{path} is not a ledger or is damaged: {error}",
            hint=f"move it away and record what is on disk again: pgolf-post ledger scan --root {path.parent}",
        ) from error
