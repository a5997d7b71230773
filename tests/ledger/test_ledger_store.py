"""The ledger's file: nothing is lost between processes, nothing is overwritten unasked, damage is named."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgolf_post.errors import DamagedFileError, MismatchError, NotFoundError, NumericsError, PgolfError, SettingsError
from pgolf_post.ledger import LEDGER_FILE, Ledger, Row, waiting
from pgolf_post.ledger.recording import record
from tests import processes

WRITER = """
import sys
from pathlib import Path
from pgolf_post.ledger import Ledger, Row
root, process, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with Ledger.open(root) as ledger:
    for number in range(count):
        assert ledger.add(Row("trial", f"p{process}-{number}", ("shared",), result={"bpb": number / 7}))
        ledger.add(Row("checkpoint", f"shared-{number}", name="the same from all"))
"""


def row(**changes: object) -> Row:
    base = {"id": "a1", "name": "control", "settings": {"clip": 12.85}, "result": {"bpb": 1.1}, **changes}
    return Row("trial", **base)


@pytest.fixture
def ledger(tmp_path):
    with Ledger.open(tmp_path) as opened:
        yield opened


def write_from_processes(root: Path, writers: int, count: int) -> None:
    command = ["-c", WRITER, str(root)]
    running = [processes.Process([*command, str(number), str(count)]) for number in range(writers)]
    assert [process.wait() for process in running] == [0] * writers
    with Ledger.open(root) as ledger:
        written = {trial.id: trial.result["bpb"] for trial in ledger.rows("trial")}
        assert written == {f"p{p}-{n}": n / 7 for p in range(writers) for n in range(count)}
        assert len(ledger.rows("checkpoint")) == count


def test_rows_of_concurrent_processes_are_all_there(tmp_path):
    write_from_processes(tmp_path / "new", writers=3, count=20)  # they also race to create it


@pytest.mark.long
def test_rows_of_eight_processes_are_all_there(tmp_path):
    write_from_processes(tmp_path / "new", writers=8, count=200)


def test_a_killed_writer_leaves_whole_rows_and_the_next_goes_on(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        writer = processes.Process(["-c", WRITER, str(tmp_path), "0", "1000000"])
        while len(ledger.rows("trial")) < 5:
            assert writer.poll() is None
        writer.kill()
        writer.wait()
        written = ledger.rows("trial")
        assert [trial.id for trial in written] == [f"p0-{number}" for number in range(len(written))]
        assert all(trial.result == {"bpb": number / 7} for number, trial in enumerate(written))
        assert ledger.add(row())


def test_a_row_comes_back_as_it_was(ledger):
    full = row(
        parents=("p", "q"),
        run="sweep",
        commit="abc",
        device="cpu",
        seconds=1.5,
        cost_dollars=0.25,
        verdict="no-op",
        conclusion="λ does nothing here",
        created="2026-01-02T03:04:05.000+00:00",
    )
    assert ledger.add(full)
    assert ledger.get("trial", "a1") == full
    assert ledger.get("score", "a1") is None


def test_adding_twice_is_once_and_other_content_is_refused(ledger):
    assert ledger.add(row())
    assert not ledger.add(row(seconds=99.0, device="gpu"))  # when and where are not content
    with pytest.raises(MismatchError, match=r"result\.bpb: 1\.1 → 1\.2"):
        ledger.add(row(result={"bpb": 1.2}))
    assert ledger.get("trial", "a1").result == {"bpb": 1.1}
    assert not ledger.add(row(result={"bpb": 1.2}), replace=True)
    assert ledger.get("trial", "a1").result == {"bpb": 1.2}


def test_many_rows_are_added_all_or_none(ledger):
    ledger.add(row())
    with pytest.raises(MismatchError):
        ledger.add_all([row(id="b"), row(id="c"), row(settings={"clip": 3})])
    assert [r.id for r in ledger.rows()] == ["a1"]
    assert ledger.add_all([row(), row(id="b")]) == 1


def test_completing_keeps_what_was_known(ledger):
    assert ledger.complete(row(seconds=3.0))
    assert not ledger.complete(row(name="other", result={"total_bytes": 9}, seconds=5.0, device="cpu"))
    assert not ledger.complete(row(device="gpu"))
    known = ledger.get("trial", "a1")
    assert known.result == {"bpb": 1.1, "total_bytes": 9}
    assert (known.name, known.seconds, known.device) == ("control", 5.0, "cpu")


def test_notes_stand_on_the_row_and_outlive_its_replacement(ledger):
    ledger.add(row(id="a1b2c3"))
    ledger.note("a1b", "first thought", "negative")
    ledger.note("control", "second thought")
    noted = ledger.get("trial", "a1b2c3")
    assert (noted.conclusion, noted.verdict) == ("second thought", "negative")
    ledger.add(row(id="a1b2c3", result={"bpb": 2.0}), replace=True)
    ledger.complete(row(id="a1b2c3", result={"bpb": 3.0}))
    assert ledger.get("trial", "a1b2c3").conclusion == "second thought"
    assert [(note.parents, note.conclusion) for note in ledger.rows("note")] == [
        (("a1b2c3",), "first thought"),
        (("a1b2c3",), "second thought"),
    ]


def test_prefixes_find_one_row_or_list_all(ledger):
    ledger.add_all([row(id="abc1", name="x"), row(id="abd2", name="y")])
    assert ledger.find("abc").id == "abc1"
    assert ledger.find("y").id == "abd2"
    with pytest.raises(MismatchError, match=r"abc1.*abd2"):
        ledger.find("ab")
    with pytest.raises(NotFoundError, match="zzz"):
        ledger.find("zzz")


def test_filters_reach_columns_results_and_settings(ledger):
    first = row(id="a", run="s1", settings={"mlp": {"clip": 10}, "isolated": True}, verdict="positive")
    ledger.add_all([first, row(id="b", run="s2", settings={"mlp": {"clip": 11.5}})])
    for where in ({"mlp.clip": "10"}, {"mlp.clip": 10}, {"verdict": "positive"}, {"isolated": "true"}):
        assert [r.id for r in ledger.rows(where=where)] == ["a"], where
    assert [r.id for r in ledger.rows("trial", run="s2", where={"bpb": "1.1"})] == ["b"]
    assert ledger.rows("score") == ledger.rows(where={"no.such": "1"}) == []


def test_what_is_no_ledger_is_named(tmp_path):
    (tmp_path / LEDGER_FILE).write_bytes(b"this is not a database at all" * 40)
    with pytest.raises(DamagedFileError, match=r"ledger\.sqlite is not a ledger"):
        Ledger.open(tmp_path)


def test_another_version_is_refused_and_left_alone(tmp_path):
    with Ledger.open(tmp_path) as ledger:
        ledger.add(row())
    with sqlite3.connect(tmp_path / LEDGER_FILE) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(DamagedFileError, match="version 7, this program reads 3"):
        Ledger.open(tmp_path)


def test_a_read_only_ledger_is_read_and_not_written(tmp_path):
    with pytest.raises(NotFoundError, match="no ledger"):
        Ledger.open(tmp_path, read_only=True)
    (tmp_path / LEDGER_FILE).touch()
    with pytest.raises(NotFoundError, match=r"no ledger at \S+ledger\.sqlite: the file is empty"):
        Ledger.open(tmp_path, read_only=True)
    with Ledger.open(tmp_path) as ledger:
        ledger.add(row())
    with Ledger.open(tmp_path, read_only=True) as ledger:
        assert [r.id for r in ledger.rows()] == ["a1"]
        with pytest.raises(PgolfError, match="readonly"):
            ledger.add(row(id="b"))


NOBODY = 65534


@contextmanager
def without_write_access(folder: Path) -> Iterator[None]:
    """The folder as one that this process may only read, also where the tests run as root."""
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.fixture
def open_folder():
    """A folder that other users can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def test_a_folder_without_write_access_is_read_and_not_recorded_in(open_folder, capsys):
    with Ledger.open(open_folder) as ledger:
        ledger.add(row())
    with without_write_access(open_folder):
        with Ledger.open(open_folder, read_only=True) as ledger:
            assert [r.id for r in ledger.rows()] == ["a1"]
        assert not record(rows=lambda: [row(id="b")], root=open_folder)
    assert "not recorded in the ledger" in capsys.readouterr().err
    with Ledger.open(open_folder) as ledger:
        assert [r.id for r in ledger.rows()] == ["a1"]


def test_what_another_process_has_not_yet_merged_is_read_too(open_folder):
    """The write-ahead log is part of the ledger, also for who may only read."""
    with Ledger.open(open_folder) as writer:
        writer.add(row())
        assert (open_folder / f"{LEDGER_FILE}-wal").stat().st_size
        with without_write_access(open_folder), Ledger.open(open_folder, read_only=True) as ledger:
            assert [r.id for r in ledger.rows()] == ["a1"]


def test_rows_that_mean_nothing_are_refused():
    with pytest.raises(SettingsError, match="kind 'experiment' is not one of run, "):
        Row("experiment", "x")
    with pytest.raises(SettingsError, match="verdict 'great'"):
        row(verdict="great")
    with pytest.raises(SettingsError, match="needs an id"):
        row(id="")
    with pytest.raises(NumericsError, match="result cannot be kept"):
        row(result={"bpb": float("nan")})


def test_the_settings_hash_is_of_the_settings_alone():
    assert row().settings_hash == row(id="b", result={}).settings_hash
    assert row().settings_hash != row(settings={"clip": 12.86}).settings_hash


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a ledger's lock in another process, as a writer that is stopped does."""
    script = f"""
import sqlite3, sys
connection = sqlite3.connect({str(path)!r}, isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE rows SET name = 'unfinished'")
print("locked", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        yield
    finally:
        holder.communicate()


def test_a_locked_ledger_is_waited_for_aloud_by_the_name_of_who_holds_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waiting, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "BUSY_SECONDS", 0.05)
    ledger._connection.execute("PRAGMA busy_timeout = 0")
    ledger.add(row())
    with locked(ledger.path):
        assert ledger.ids("trial") == {"a1"}  # readers never wait
        assert len(waiting.lock_holders(ledger.path)) == 1
        with pytest.raises(PgolfError, match=r"process \d+ .*python.* has been writing to it .*nothing was changed"):
            ledger.add(row(id="b2"))
        assert re.search(r"waiting up to .* for the ledger .*: process \d+ \(.*python", capsys.readouterr().err)
    assert ledger.add(row(id="b2"))  # once it is free, without a word
    assert "waiting" not in capsys.readouterr().err


def test_a_writer_waits_until_the_other_is_done(ledger: Ledger, capsys: pytest.CaptureFixture[str]) -> None:
    ledger.add(row())
    attempts: list[int] = []

    def busy_twice() -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise sqlite3.OperationalError("database is locked")
        return "done"

    assert waiting.patiently(ledger.path, busy_twice) == "done"
    assert not capsys.readouterr().err
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        waiting.patiently(ledger.path, lambda: ledger._connection.execute("SELECT * FROM absent"))


def test_nobody_is_named_where_locks_are_not_listed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOCKS", ledger.path / "absent")
    assert waiting.writers(ledger.path) == "another process"
