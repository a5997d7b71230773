"""A ledger that flushes later: rows are there at once, the disk is waited for elsewhere, failures are told."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest

from pgolf_post.errors import PgolfError
from pgolf_post.ledger import Ledger, Row, later_sync


def row(number: int) -> Row:
    return Row("trial", f"{number:064d}", name=f"trial {number}")


def test_rows_are_there_at_once_and_flushed_on_another_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, real = list[int](), later_sync.flush_to_disk

    def watched(path: Path) -> None:
        threads.append(threading.get_ident())
        real(path)

    monkeypatch.setattr(later_sync, "flush_to_disk", watched)
    with Ledger.open(tmp_path, flush_later=True) as ledger:
        for number in range(20):
            ledger.add(row(number))
            with sqlite3.connect(tmp_path / "ledger.sqlite") as other:  # another process sees it
                assert other.execute("SELECT count(*) FROM rows").fetchone() == (number + 1,)
    assert 1 <= len(threads) <= 21
    assert threading.get_ident() not in threads
    with Ledger.open(tmp_path) as ledger:
        assert len(ledger.rows("trial")) == 20


def test_what_became_due_during_a_flush_is_flushed_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes, started = list[Path](), threading.Event()

    def slow(path: Path) -> None:
        flushes.append(path)
        started.set()
        while not sync._closing:  # the first one lasts until the end is asked for
            time.sleep(0.001)

    monkeypatch.setattr(later_sync, "flush_to_disk", slow)
    (tmp_path / "wal").touch()
    sync = later_sync.LaterSync(tmp_path / "wal")
    sync.due()
    assert started.wait(10)
    sync.due()
    sync.close()
    assert len(flushes) == 2


def test_a_flush_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(later_sync, "flush_to_disk", failing)
    ledger = Ledger.open(tmp_path, flush_later=True)
    ledger.add(row(1))
    with pytest.raises(PgolfError, match="could not be flushed to the disk"):
        ledger.close()


def test_other_ledgers_wait_for_the_disk(tmp_path: Path) -> None:
    for flush_later, level in ((False, 2), (True, 1)):  # FULL, NORMAL
        with Ledger.open(tmp_path, flush_later=flush_later) as ledger:
            assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (level,)
